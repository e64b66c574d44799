"""Content by CID: sources that nobody has to trust, the fetcher that verifies them, the cache, and publishing."""
