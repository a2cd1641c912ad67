"""From captured charges to the chain and back: lanes that send, an indexer that reads."""
