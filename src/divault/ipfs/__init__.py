"""IPFS content, pure: CIDs, dag-pb, UnixFS, CARs, verifier and importer. Bytes in, values or typed errors out."""
