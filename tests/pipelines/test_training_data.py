"""What training reads: stores by settings, checked against the backbone's tokenizer; lanes by mode."""

import logging
from pathlib import Path
from typing import Any

import pytest

from pipelines import storage
from pipelines.config import InputError, build
from pipelines.data import lanes, sampling, store, task_lanes
from pipelines.data.mixture import Mixture
from pipelines.data.store import DocumentEntry, PartWriter, SegmentStore
from pipelines.data.tokenise import ByteTokenizer
from pipelines.training.reading import make_lanes, open_store
from pipelines.training.settings import TrainConfig


@pytest.fixture
def stores(tmp_path: Path) -> list[str]:
    """Two of bytes, of 6 and 3 documents of 100 bytes."""
    found = []
    for name, num_documents in (("one", 6), ("two", 3)):
        directory = tmp_path / name
        directory.mkdir()
        ByteTokenizer().save_pretrained(directory)
        entries = []
        with PartWriter(directory / store.part_name(0)) as writer:
            for number in range(num_documents):
                tokens = ByteTokenizer().encode(f"{name}{number}".ljust(100, "."))
                entries.append(
                    DocumentEntry(
                        f"{number}", "", 100, 100, 2, store.part_name(0), writer.num_rows, tokens.tobytes().hex()
                    )
                )
                for segment in range(2):
                    writer.add(f"{number}", segment, tokens[64 * segment : 64 * segment + 64])
        store.write_manifest(str(directory), entries)
        content = dict.fromkeys(store._IDENTITY, name) | {"format": store.FORMAT, "segment_len": 64}
        content["tokenizer_fingerprint"] = ByteTokenizer().fingerprint
        storage.write_json(str(directory / store.STORE), content)
        found.append(str(directory))
    return found


def config(**changes: Any) -> TrainConfig:
    return build(TrainConfig, {"batch_size": 4, **changes})


def test_one_store_or_several_with_or_without_weights(stores: list[str]) -> None:
    assert isinstance(open_store(config(data=stores[0])), SegmentStore)
    assert isinstance(open_store(config(data=stores[:1])), SegmentStore)
    assert len(open_store(config(data=stores)).manifest) == 9
    weighted = open_store(config(data=stores, dataset={"weights": [1, 2]}))
    assert isinstance(weighted, Mixture)
    assert [share.weight for share in weighted.shares] == [1, 2]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0], [1.0, 1.0, 1.0], []])
def test_weights_are_one_above_zero_for_each_store(weights: list[float], stores: list[str]) -> None:
    with pytest.raises(InputError, match="for 2 stores of data; give one above 0 for each"):
        config(data=stores, dataset={"weights": weights})
    with pytest.raises(InputError, match="for 0 stores"):
        config(dataset={"weights": weights})


def test_data_of_another_tokenizer_than_the_backbones_is_refused(stores: list[str], tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    ByteTokenizer().save_pretrained(backbone)
    settings = {"data": stores, "model": {"backbone": str(backbone)}}
    assert len(open_store(config(**settings)).manifest) == 9
    content = storage.read_json(str(backbone / "tokenizer.json"))
    content["model"]["vocab"]["xy"] = 257
    storage.write_json(str(backbone / "tokenizer.json"), content)
    with pytest.raises(InputError) as caught:
        open_store(config(**settings))
    assert ByteTokenizer().fingerprint[:16] in str(caught.value)
    assert "brings tokenizer " in str(caught.value)
    assert f"--tokenizer {backbone}" in str(caught.value)


def test_a_backbone_without_a_tokenizer_is_told_to_be_unchecked(
    stores: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        open_store(config(data=stores, model={"backbone": str(tmp_path)}))
    assert f"model.backbone {tmp_path} brings no tokenizer.json" in caplog.text


@pytest.mark.parametrize("mode", ["stream", "sample"])
def test_rows_read_by_mode_beside_those_of_tasks(mode: str, stores: list[str]) -> None:
    settings = config(data=stores, dataset={"mode": mode, "task_fraction": 0.5})
    opened = open_store(settings)
    made = make_lanes(settings, opened, opened.load_tokenizer())
    kind = lanes.DocumentLane if mode == "stream" else sampling.SampleLane
    assert [type(lane) for lane in made] == [task_lanes.TaskLane] * 2 + [kind] * 2
    described = made[-1].source.describe()
    assert "21.9% of" in described  # 100 of 128 places hold a token
    window = lanes.Lanes(made, opened.segment_len).window(0, 2)
    assert window.reset[:, 0].all()
    assert window.lengths[2:].tolist() == [[64, 36]] * 2


def test_data_without_documents_is_refused(stores: list[str]) -> None:
    store.write_manifest(stores[0], [])
    settings = config(data=stores[0])
    opened = open_store(settings)
    with pytest.raises(InputError, match="holds no documents"):
        make_lanes(settings, opened, opened.load_tokenizer())
