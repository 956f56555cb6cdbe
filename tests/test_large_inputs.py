"""Inputs that are larger than they look: images that unpack to gigabytes, large labels, pipes without an end."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib

import pytest

from gradprobe.trainers.data.data_yaml import MAX_TEXT, read_text
from gradprobe.trainers.data.images import UnreadableImage, decode


def png(path, width, height):
    """A small file of one grey level."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 13_300, 20_000])
def test_an_image_that_unpacks_to_more_than_memory_is_named_and_not_decoded(tmp_path, side):
    path = png(tmp_path / "bomb.png", side, side)
    assert path.stat().st_size < 100_000
    with pytest.raises(UnreadableImage, match="pixels"):
        decode(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of memory there")
def test_a_label_file_of_a_gigabyte_is_refused_within_a_bound_of_memory(tmp_path):
    path = tmp_path / "label.txt"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # a sparse file
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from gradprobe.trainers.data.data_yaml import read_text\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try:\n    read_text(Path(sys.argv[1]))\nexcept OSError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert f"has more than {MAX_TEXT:,} bytes" in found.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders there")
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_has_no_end_is_not_read(tmp_path, make):
    path = tmp_path / "label.txt"
    make(path)
    with pytest.raises(OSError, match="is no regular file, but a"):
        read_text(path)
    with pytest.raises(UnreadableImage, match="is no regular file, but a"):
        decode(path)
