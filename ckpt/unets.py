"""Old names, until their callers have moved: write `from ckpt import …`."""

from ckpt import (  # noqa: F401
    convert, find_checkpoint, fingerprint, load_strict, load_unet, open_unet, read_tensors,
    save_checkpoint, save_unet,
)
from ckpt.convert import with_table  # noqa: F401
from harness.files import check_shapes  # noqa: F401
from harness.files import listed as some  # noqa: F401
from harness.files import write_tensors  # noqa: F401
