"""Writes the Parquet files beside it, with pyarrow 26.0.1, as `datasets` writes them (but for the codecs)."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

here = Path(__file__).parent

rows = pa.table({
    "instruction": ["Name a colour.", "Add the numbers."],
    "input": pa.array([None, "2 and 3"], pa.string()),
    "output": ["Blue.", "5 – of course."],
    "tags": [["a", None], []],
    "score": pa.array([0.5, None], pa.float32()),
    "when": pa.array([0, 1], pa.timestamp("us")),
})
pq.write_table(rows, here / "rows.parquet", compression="snappy", row_group_size=1)
pq.write_table(rows, here / "gzip.parquet", compression="gzip")

turn = pa.struct([("role", pa.string()), ("content", pa.string())])
talk = lambda *texts: [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(texts)]
turns = pa.table({
    "prompt_id": pa.array([b"\xff\x00", b"x"], pa.binary()),
    "messages": pa.array([
        talk("Hello?", "Hi!", "Who are you?", "A fox."),
        [{"role": "system", "content": "Be brief."}, *talk("Why?", "Because.")],
    ], pa.list_(turn)),
})
pq.write_table(turns, here / "turns.parquet", compression="zstd")
