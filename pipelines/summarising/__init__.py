"""What a summary job is made of: strategies, workers, and the ledger of what is done."""
