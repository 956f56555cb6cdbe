"""Run files as an attacker, a broken disk or another program might hand them over, each with what is said of it.

`python tests/hostile.py FOLDER` writes them all. Each but the damaged ones carries sums that are right: whoever can
write the file can write those too, so they must not be what protects from it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t
from run_factory import make_run

from gradprobe.runfile.files import seal

CORPUS: dict[str, tuple[Callable[[Path], object], str]] = {}
"""Name to what makes the file at a path, and a pattern that the refusal holds."""


def hostile(says: str):
    def register(make: Callable[[Path], object]):
        CORPUS[make.__name__] = (make, says)
        return make

    return register


@contextmanager
def changed(path: Path, **options) -> Iterator[h5py.File]:
    """A good run, open for changes, with new sums afterwards."""
    make_run(path, rows=12, layers=4, epochs=2, **options)
    with h5py.File(path, "r+", libver=("v108", "v110")) as file:
        yield file
    with path.open("rb+") as raw:
        seal(raw)


def drop(file: h5py.File, name: str) -> None:
    """Remove a dataset with what refers to it, so that only the replacement is odd."""
    for other in file.values():
        if isinstance(other, h5py.Dataset) and "DIMENSION_LIST" in other.attrs:
            del other.attrs["DIMENSION_LIST"]
    del file[name]


def replaced(path: Path, name: str, **dataset) -> None:
    with changed(path) as file:
        drop(file, name)
        file.create_dataset(name, **dataset)


# ---- ways out of the file


@hostile("/elsewhere is a link to elsewhere")
def soft_link(path):
    with changed(path) as file:
        file["elsewhere"] = h5py.SoftLink("/loss")


@hostile("/loss is a link to elsewhere")
def soft_link_in_place_of_a_dataset(path):
    with changed(path) as file:
        drop(file, "loss")
        file["loss"] = h5py.SoftLink("/shared_grad_norm")


@hostile("/provenance/far is a link to elsewhere")
def external_link_in_a_group(path):
    with changed(path) as file:
        file["provenance/far"] = h5py.ExternalLink("/etc/hostname", "/")


@hostile("/loss is a link to elsewhere")
def external_link_to_a_pipe(path):
    pipe = path.with_suffix(".pipe")
    os.mkfifo(pipe)
    with changed(path) as file:
        drop(file, "loss")
        file["loss"] = h5py.ExternalLink(str(pipe), "/loss")


@hostile("/loss is a virtual dataset")
def virtual_dataset(path):
    with changed(path) as file:
        drop(file, "loss")
        layout = h5py.VirtualLayout((12, 2), "<f4")
        layout[:] = h5py.VirtualSource("/etc/hostname", "x", (12, 2))
        file.create_virtual_dataset("loss", layout)


@hostile("/loss has external storage")
def external_storage(path):
    replaced(path, "loss", shape=(12, 2), dtype="<f4", external=[("/etc/passwd", 0, 96)])


@hostile("/anything has external storage")
def external_storage_in_an_unknown_dataset(path):
    with changed(path) as file:
        file.create_dataset("anything", shape=(12,), dtype="|u1", external=[("/etc/passwd", 0, 12)])


# ---- filters


@hostile("/loss uses a filter")
def gzip_filter(path):
    replaced(path, "loss", data=np.zeros((12, 2), "<f4"), compression="gzip")


def direct_chunk(path: Path, packed: bytes) -> None:
    import zlib

    with changed(path) as file:
        drop(file, "loss")
        loss = file.create_dataset("loss", (12, 2), "<f4", chunks=(12, 2), compression="gzip")
        loss.id.write_direct_chunk((0, 0), zlib.compress(packed))


@hostile("/loss uses a filter")
def chunk_that_inflates_short(path):
    direct_chunk(path, b"short")


@hostile("/loss uses a filter")
def chunk_that_inflates_long(path):
    direct_chunk(path, bytes(1 << 24))


UNKNOWN_FILTER = 511
"""From the numbers that HDF5 reserves for tests: a package such as netCDF4 brings registered ones along when loaded."""


def unknown_filter_dataset(file: h5py.File, name: str) -> None:
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_chunk((12, 2))
    plist.set_filter(UNKNOWN_FILTER, h5py.h5z.FLAG_OPTIONAL)
    h5d.create(file.id, name.encode(), h5t.IEEE_F32LE, h5s.create_simple((12, 2)), plist).write_direct_chunk(
        (0, 0), bytes(96)
    )


@hostile("/loss uses a filter")
def unknown_filter(path):
    with changed(path) as file:
        drop(file, "loss")
        unknown_filter_dataset(file, "loss")


# ---- types


@hostile("/pairs is of a foreign type")
def compound_type(path):
    with changed(path) as file:
        file["pairs"] = np.zeros(3, [("a", "<i4"), ("b", "<f8")])


@hostile("/references is of a foreign type")
def object_references(path):
    with changed(path) as file:
        file["references"] = np.array([file["loss"].ref, file["provenance"].ref], dtype=h5py.ref_dtype)


@hostile("/ragged is of a foreign type")
def variable_length_numbers(path):
    with changed(path) as file:
        file.create_dataset("ragged", (3,), h5py.vlen_dtype("<i4"))


@hostile("/reach is of a foreign type")
def enumeration(path):
    replaced(path, "reach", data=np.ones((4, 2), "|u1"), dtype=h5py.enum_dtype({"no": 0, "yes": 1}, "|u1"))


@hostile("/opaque is of a foreign type")
def opaque(path):
    with changed(path) as file:
        file.create_dataset("opaque", data=np.zeros(3, "V7"))


@hostile("/kind is a second link to one object, or neither group nor dataset")
def committed_type(path):
    with changed(path) as file:
        file["kind"] = np.dtype("<f4")


@hostile("'loss' holds float64, not float32")
def double_in_place_of_float(path):
    replaced(path, "loss", data=np.zeros((12, 2), "<f8"))


@hostile("'loss' holds >f4, not float32")
def big_endian(path):
    replaced(path, "loss", data=np.zeros((12, 2), ">f4"))


@hostile("'loss' holds .*, not float32")
def float_of_odd_layout(path):
    with changed(path) as file:
        drop(file, "loss")
        kind = h5t.IEEE_F32LE.copy()
        kind.set_ebias(90)
        h5d.create(file.id, b"loss", kind, h5s.create_simple((12, 2))).write(h5s.ALL, h5s.ALL, np.zeros((12, 2), "<f4"))


@hostile("'layer' does not hold names")
def names_of_fixed_length(path):
    replaced(path, "layer", data=np.array([b"a", b"b", b"c", b"d"]))


# ---- sizes and shapes


@hostile("/loss claims 8,796,093,022,208 bytes, but 0 are stored")
def claims_a_trillion_rows(path):
    replaced(path, "loss", shape=(1 << 40, 2), dtype="<f4", chunks=(1 << 10, 2))


@hostile("/step claims 96 bytes, but 0 are stored")
def rows_that_were_never_written(path):
    replaced(path, "step", shape=(12,), dtype="<i8")


@hostile("/loss claims 131,072 bytes, but 65,536 are stored")
def chunk_that_is_not_there(path):
    with changed(path) as file:
        drop(file, "loss")
        file.create_dataset("loss", (12, 2), "<f4", maxshape=(None, None), chunks=(1 << 14, 1))
        file["loss"][:, 0] = 1.0  # the second column would read as zeros


@hostile("/loss has chunks of 1,073,741,824 bytes")
def chunk_of_a_gigabyte(path):
    replaced(path, "loss", shape=(12, 2), dtype="<f4", maxshape=(None, 2), chunks=(1 << 27, 2))


@hostile("'loss' has shape .11, 2., not .12, 2.")
def too_few_rows(path):
    replaced(path, "loss", data=np.zeros((11, 2), "<f4"))


@hostile("'reach' has shape .2, 4., not .4, 2.")
def axes_swapped(path):
    replaced(path, "reach", data=np.ones((2, 4), "|u1"))


@hostile("'step' has 2 axes, not 1")
def step_with_two_axes(path):
    replaced(path, "step", data=np.zeros((12, 1), "<i8"))


@hostile("/step has no axes")
def scalar_in_place_of_an_array(path):
    replaced(path, "step", data=np.int64(3))


@hostile("/step has no axes")
def dataset_without_a_space(path):
    replaced(path, "step", data=h5py.Empty("<i8"))


@hostile("has 2 pairs for 2 tasks")
def pairs_too_many(path):
    replaced(path, "pair", data=["det|cls", "cls|det"], dtype=h5py.string_dtype())


@hostile("its pairs are ..cls.det.., those of its tasks are ..det.cls..")
def pairs_of_other_tasks(path):
    replaced(path, "pair", data=["cls|det"], dtype=h5py.string_dtype())


@hostile("has shape .3,., not .2,.")
def metric_longer_than_its_axis(path):
    with changed(path) as file:
        file["epochs/odd"] = np.zeros(3)


@hostile("no dataset 'step'")
def dataset_missing(path):
    with changed(path) as file:
        drop(file, "step")


@hostile("no dataset 'cosine'")
def group_in_place_of_a_dataset(path):
    with changed(path) as file:
        drop(file, "cosine")
        file.create_group("cosine")


@hostile("has no group 'provenance'")
def provenance_missing(path):
    with changed(path) as file:
        del file["provenance"]


# ---- structure


@hostile("is a second link to one object")
def cycle_of_hard_links(path):
    with changed(path) as file:
        inner = file.create_group("a/b")
        inner["a"] = file["a"]


@hostile("is a second link to one object")
def cycle_through_the_root(path):
    with changed(path) as file:
        file["provenance/root"] = file["/"]


@hostile("is a second link to one object")
def two_names_for_one_dataset(path):
    with changed(path) as file:
        file["again"] = file["loss"]


@hostile("lies too deep")
def nested_deeply(path):
    with changed(path) as file:
        group = file
        for _ in range(2000):
            group = group.create_group("g")


@hostile("holds too much")
def very_many_objects(path):
    with changed(path) as file:
        group = file.create_group("many")
        for index in range(10_001):
            group.create_group(str(index))


# ---- text


@hostile("'layer' holds names of up to 70,000 bytes")
def name_of_great_length(path):
    replaced(path, "layer", data=["a" * 70_000, "b", "c", "d"], dtype=h5py.string_dtype())


@hostile("'layer' holds names of up to 4,294,967,295 bytes")
def name_that_claims_gigabytes(path):
    with changed(path) as file:
        offset = file["layer"].id.get_offset()
    reseal(path, lambda data: data.__setitem__(slice(offset, offset + 4), b"\xff" * 4))


@hostile("'layer' holds a name twice")
def layers_of_one_name(path):
    replaced(path, "layer", data=["a", "b", "a", "d"], dtype=h5py.string_dtype())


@hostile("'layer' holds a name that is empty or not printable")
def name_that_steers_the_terminal(path):
    replaced(path, "layer", data=["a\x1b[2J", "b", "c", "d"], dtype=h5py.string_dtype())


@hostile("'task' holds a name that is empty or not printable")
def name_that_is_empty(path):
    replaced(path, "task", data=["", "cls"], dtype=h5py.string_dtype())


@hostile("is not a complete run file")
def name_that_is_not_utf8(path):
    replaced(path, "layer", data=[b"\xff\xfe", b"b", b"c", b"d"], dtype=h5py.string_dtype())


# ---- attributes


@hostile("encoding-type is 'anndata'")
def another_format(path):
    with changed(path) as file:
        file.attrs["encoding-type"] = "anndata"


@hostile(r"format version 2\.1.*pip install -U gradprobe")
def a_later_version(path):
    with changed(path) as file:
        file.attrs["encoding-version"] = "2.1"


@hostile("'encoding-version' of / is of the wrong type: float")
def version_as_a_number(path):
    with changed(path) as file:
        file.attrs["encoding-version"] = 1.0


@hostile("'end' of / is missing")
def attribute_missing(path):
    with changed(path) as file:
        del file.attrs["end"]


@hostile("'end' of / is of the wrong type: list")
def list_in_place_of_text(path):
    with changed(path) as file:
        file.attrs["end"] = ["finished", "failed"]


@hostile("'merged_through' of / is of the wrong type: str")
def text_in_place_of_a_number(path):
    with changed(path) as file:
        file.attrs["merged_through"] = "all"


@hostile("'merged_through' of / is -1")
def negative_count(path):
    with changed(path) as file:
        file.attrs["merged_through"] = -1


@hostile("'rows_dropped' of / is of a foreign type")
def reference_in_an_attribute(path):
    with changed(path) as file:
        file.attrs["rows_dropped"] = file["loss"].ref


@hostile("'table' of /provenance has 2 dimensions")
def matrix_in_an_attribute(path):
    with changed(path) as file:
        file["provenance"].attrs["table"] = np.zeros((2, 2))


@hostile("'hyp.box' of /provenance is of a foreign type")
def compound_in_an_attribute(path):
    with changed(path) as file:
        file["provenance"].attrs["hyp.box"] = np.zeros(1, [("a", "<i4")])[0]


@hostile("'notes' of /provenance is too large")
def attribute_of_megabytes(path):
    with changed(path) as file:
        file["provenance"].attrs["notes"] = np.zeros(1 << 18)


@hostile("'notes' of /provenance is too large")
def text_of_megabytes(path):
    with changed(path) as file:
        file["provenance"].attrs["notes"] = "x" * (2 << 20)


@hostile("'notes' of /provenance holds 60,000 variable-length strings")
def very_many_strings(path):
    with changed(path) as file:
        file["provenance"].attrs["notes"] = ["x"] * 60_000


@hostile("/provenance has 10,00. attributes")
def very_many_attributes(path):
    with changed(path) as file:
        for index in range(10_001):
            file["provenance"].attrs[str(index)] = 1


@hostile("'status_names' of /status is of the wrong type")
def status_names_of_numbers(path):
    with changed(path) as file:
        file["status"].attrs["status_names"] = [1, 2]


# ---- files that are no files, damage


def reseal(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change bytes and make the sums right again."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[28:36], "little")
    data = data[:length]
    change(data)
    path.write_bytes(data)
    with path.open("rb+") as raw:
        seal(raw)


def cut(path: Path, keep: Callable[[int], int]) -> None:
    make_run(path, rows=12, layers=4)
    data = path.read_bytes()
    path.write_bytes(data[: keep(len(data))])


@hostile("it is not an HDF5 file")
def empty_file(path):
    path.write_bytes(b"")


@hostile("it is not an HDF5 file")
def text_file(path):
    path.write_text("step,loss\n1,2\n")


@hostile("it is not a regular file")
def pipe(path):
    os.mkfifo(path)


@hostile("it is not a regular file")
def device(path):
    path.symlink_to("/dev/zero")


@hostile("it is not a regular file")
def folder(path):
    path.mkdir()


@hostile("no such file|cannot be read")
def link_to_nowhere(path):
    path.symlink_to("nowhere.h5")


@hostile("cannot be read as a run file")
def signature_alone(path):
    path.write_bytes(b"\x89HDF\r\n\x1a\n")


@hostile("it is cut short")
def cut_in_half(path):
    cut(path, lambda size: size // 2)


@hostile("its sums are damaged")
def last_byte_missing(path):
    cut(path, lambda size: size - 1)


@hostile("its sums are damaged")
def bytes_appended(path):
    make_run(path, rows=12)
    with path.open("ab") as file:
        file.write(b"more")


@hostile("it is damaged: bytes 4,096 to 8,192 do not match their sum")
def one_bit_flipped(path):
    make_run(path, rows=12)
    data = bytearray(path.read_bytes())
    data[5000] ^= 4
    path.write_bytes(data)


@hostile("cannot be read as a run file")
def superblock_of_noise(path):
    make_run(path, rows=12)
    reseal(path, lambda data: data.__setitem__(slice(36, 48), b"\xa5" * 12))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    for title, (build, _) in CORPUS.items():
        build(target / f"{title}.h5")
    print(f"{len(CORPUS)} files in {target}")
