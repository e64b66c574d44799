"""From a model on disk to a model for sale: seal it, store it by CID, register it in the vault; and who opens it then.

Killed at any moment and run again, a publish ends with the same CID and one registration.
"""

from divault.publishing.access import Access, Changed, Standing
from divault.publishing.publisher import Published, Publisher
from divault.publishing.recognition import Recognised, recognise
from divault.publishing.records import Publication, Publications, SealedTo, Source, Stage
from divault.publishing.registration import Cost, Listing, Registry
from divault.publishing.sealing import measure, pack_folder, seal_path, sealed_size

__all__ = [
    "Access",
    "Changed",
    "Cost",
    "Listing",
    "Publication",
    "Publications",
    "Published",
    "Publisher",
    "Recognised",
    "Registry",
    "SealedTo",
    "Source",
    "Stage",
    "Standing",
    "measure",
    "pack_folder",
    "recognise",
    "seal_path",
    "sealed_size",
]
