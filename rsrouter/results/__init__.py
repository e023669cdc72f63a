"""The results table: its rows, a crash-safe writer, a reader for ours and the field's, and merging of shards."""

from rsrouter.results.about import ExpertRecord, Shard, TableMetadata, TreeRecord, pack_ids
from rsrouter.results.merge import merge_tables
from rsrouter.results.metadata import metadata_path, read_metadata
from rsrouter.results.patience import table_patience
from rsrouter.results.plain import csv_cell, markdown, printable
from rsrouter.results.reading import read_table
from rsrouter.results.rows import COLUMNS, FIELD_COLUMNS, RADIUS_DECIMALS, Row, format_radius
from rsrouter.results.table import Table, align
from rsrouter.results.verify import require_sound, require_whole, unfinished, verify_rows
from rsrouter.results.writer import ResultsWriter

__all__ = [
    "COLUMNS",
    "ExpertRecord",
    "Shard",
    "TableMetadata",
    "TreeRecord",
    "pack_ids",
    "FIELD_COLUMNS",
    "RADIUS_DECIMALS",
    "ResultsWriter",
    "Row",
    "Table",
    "align",
    "csv_cell",
    "format_radius",
    "markdown",
    "merge_tables",
    "metadata_path",
    "printable",
    "read_metadata",
    "read_table",
    "require_sound",
    "require_whole",
    "table_patience",
    "unfinished",
    "verify_rows",
]
