"""Where symbolic links in a folder of strangers may lead.

A link that came with a folder can point at any file of the user's: what is read through
it would be shown in a report or travel in a package. Download caches are made of links
too, so those into a cache's own blobs are followed.
"""

import os
from pathlib import Path

# huggingface_hub: <repo>/snapshots/<commit>/FILE -> ../../blobs/<digest>
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether what lies at `path`, in `folder`, is really somewhere else.

    A link to nothing, or to itself, leads where its text says.
    """
    real, top = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(top):
        return False
    return not any(
        place.name == _SNAPSHOTS and real.is_relative_to(place.parent / _BLOBS)
        for place in top.parents
    )
