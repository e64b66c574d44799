"""How much a stranger's content may ask of us: every limit with its unit and its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of reading and verifying; all are refusals, none truncates."""

    max_block_bytes: int = 2 * 1024 * 1024
    """2 MiB: what every reader must decode and no writer exceeds (UnixFS specification)."""
    max_depth: int = 32
    """Levels of links below the root. Trees that writers make stay below 8."""
    max_size_bytes: int = 64 * 1024 * 1024
    """Bytes of the file, or of all files of a directory; a node sets MAX_MODEL_SIZE_MB here."""
    max_visits: int = 200_000
    """Links followed, repeats counted: bounds the work of a bomb; 200,000 leaves of 256 KiB are 49 GiB."""
    max_car_header_bytes: int = 1024 * 1024
    """Refused on the declared length, before anything is allocated."""
    max_links: int = 8193
    """Links of one node: 8192 is the widest tree in use (1024 by profile), plus one."""
    max_extra_bytes: int = 1024 * 1024
    """Bytes of blocks that no link asked for (yet): what an answer in another order may make us hold."""
    max_entries: int = 100_000
    """Files below a directory."""
    max_node_bytes: int = 32 * 1024 * 1024
    """Bytes of all dag-pb nodes without their file data: 52 KB per GiB in practice."""
