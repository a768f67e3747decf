"""The jobs: prepare, train, evaluate, summarise. Ray lives here; the models live in `rmt_core`."""
