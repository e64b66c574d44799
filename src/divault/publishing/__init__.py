"""From a model on disk to a model for sale: seal it, store it by CID, register it in the vault.

Killed at any moment and run again, a publish ends with the same CID and one registration.
"""

from divault.publishing.publisher import Listing, Published, Publisher, pack_folder, seal_path
from divault.publishing.records import Publication, Publications, SealedTo, Sent, Source, Stage

__all__ = [
    "Listing",
    "Publication",
    "Publications",
    "Published",
    "Publisher",
    "SealedTo",
    "Sent",
    "Source",
    "Stage",
    "pack_folder",
    "seal_path",
]
