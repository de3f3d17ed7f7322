"""What others make of our output: pyarrow, DuckDB, polars and `datasets` open scored shards and see what was written.

    pip install pyarrow duckdb polars datasets
    python tests/python/peers.py target/release/capsieve
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq

from support import picture

PROGRAM = Path(sys.argv[1]).resolve()
ROWS = 50
BAD = {7, 31}


def table(lists):
    """A shard as `datasets` writes it, with columns of types that are easily lost."""
    image = [{"bytes": b"no image" if row in BAD else picture(row), "path": f"{row}.png"} for row in range(ROWS)]
    captions = [[f"caption {row}", f"another {row}"][: row % 2 + 1] for row in range(ROWS)]
    columns = {
        "image": pa.array(image, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "caption": pa.array(captions if lists else [texts[0] for texts in captions]),
        "licence": pa.array(["cc", "by", None, "cc", "nd"] * (ROWS // 5)).dictionary_encode(),
        "seen": pa.array(range(ROWS), pa.timestamp("us", tz="Europe/Berlin")),
        "price": pa.array([f"{row}.25" for row in range(ROWS)]).cast(pa.decimal128(20, 2)),
        "tags": pa.array([[("a", row)] for row in range(ROWS)], pa.map_(pa.string(), pa.int16())),
        "large": pa.array([f"{row}" * 20 for row in range(ROWS)], pa.large_string()),
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string")) if lists
                                  else datasets.Value("string")})
    note = json.dumps({"info": {"features": features.to_dict()}})
    kept = ["image", "caption"] if not lists else list(columns)
    made = pa.table({name: columns[name] for name in kept})
    return made if lists else made.replace_schema_metadata({"huggingface": note})


def scored(folder, lists):
    source, output = Path(folder, f"in-{lists}"), Path(folder, f"out-{lists}")
    source.mkdir()
    for number in range(3):
        pq.write_table(table(lists), source / f"{number:05}.parquet")
    command = [PROGRAM, "score", "--model", "synthetic:tiny", "--min-itm", "0.1", "--input", f"{source}/", "--output", f"{output}/"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 3, done
    return source, output


def with_pyarrow(source, output):
    for number in range(3):
        before, after = (pq.read_table(folder / f"{number:05}.parquet") for folder in (source, output))
        assert after.select(before.column_names).equals(before), "every column as it was"
        assert after.schema.names[len(before.schema.names):][:2] == ["itm_score", "cosine_score"]
        assert [row for row, status in enumerate(after["score_status"].to_pylist()) if status != "ok"] == sorted(BAD)


def with_duckdb(output, lists):
    query = f"select count(*), count(itm_score), sum(case when keep then 1 else 0 end) from '{output}/*.parquet'"
    [(rows, with_score, kept)] = duckdb.sql(query).fetchall()
    assert (rows, with_score) == (3 * ROWS, 3 * (ROWS - len(BAD))) and 0 <= kept <= with_score, (rows, with_score, kept)
    if lists:
        longest = duckdb.sql(f"select max(len(itm_score)) from '{output}/*.parquet'").fetchall()
        assert longest == [(2,)], longest


def with_polars(output):
    frame = polars.read_parquet(f"{output}/*.parquet")
    assert frame.height == 3 * ROWS
    assert frame.filter(polars.col("score_status") == "decode_failed").height == 3 * len(BAD)


def with_datasets(output):
    found = datasets.load_dataset("parquet", data_files=f"{output}/*.parquet", split="train", cache_dir=f"{output}/cache")
    assert found.num_rows == 3 * ROWS and isinstance(found.features["image"], datasets.Image), found.features
    assert found.features["itm_score"] == datasets.Value("float32"), found.features
    good = found.cast_column("image", datasets.Image(decode=False))[0]
    assert good["image"]["bytes"] == picture(0) and good["score_status"] == "ok"


def main():
    with tempfile.TemporaryDirectory() as folder:
        for lists in (False, True):
            source, output = scored(folder, lists)
            with_pyarrow(source, output)
            with_duckdb(output, lists)
            with_polars(output)
            if not lists:
                with_datasets(output)
    print("ok")


main()
