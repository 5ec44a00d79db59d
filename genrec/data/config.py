"""What `genrec features` can be told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from genrec.data.split import ByTime, LeaveOneOut, Split, parse_time


@dataclass(frozen=True)
class FeaturesConfig:
    """What to read, what to keep and what to make of it."""

    events: list[Path] | Path
    """The event log: .csv, .tsv, .jsonl, .parquet, RecBole .inter, X.inter.json (user → items in time order), or .txt
    with one line a user (user item item …), text also .gz or .zst; one file, a list, a glob, or a directory, whose
    folders such as day=2024-01-01 become columns."""
    out: Path
    """Directory to write."""
    items: list[Path] | Path | None = None
    """The item file or files (.csv, .tsv, .jsonl, .parquet, RecBole .item or X.item.json), given as the events are;
    without them items have no text."""
    overwrite: bool = False
    """Replace `out` if it holds something."""
    user: str | None = None
    """Column of the user id; recognised by its usual names if not given."""
    item: str | None = None
    """Column of the item id, in both files; recognised by its usual names if not given."""
    rating: str | None = None
    """Column of the rating; recognised by its usual names if not given, "" for none."""
    time: str | None = None
    """Column of the time (unix seconds, milliseconds or finer); recognised if not given, "" for file order."""
    action: str | None = None
    """Column that names the behaviour (view, buy, …) and becomes the action token; without it the rating does."""
    context: list[str] = field(default_factory=list)
    """Columns of the log that become context tokens, one token per column and event."""
    weight: str | None = None
    """Column of a number (play time, price, quantity) that becomes a context token, by its bucket."""
    session_gap: int = 0
    """Seconds without an event that end a session; the place in the session is then a context token. 0: none."""
    hash_buckets: int = 0
    """Of items that are out of vocabulary a hash of the id, in so many buckets, becomes a context token. 0: none."""
    title: str | None = None
    """Column of the item file to show to people; recognised by its usual names if not given."""
    text: list[str] | None = None
    """Columns of the item file to make text features from; every column that is not numbers if not given."""
    max_malformed: int = 0
    """Refuse the input when more lines than this are malformed; up to it they are skipped and reported."""
    min_events: int = 3
    """Drop users with fewer events."""
    max_events: int = 200
    """Keep this many last events of every user; with split time this many last ones before `valid_from`, and all later
    ones."""
    min_count: int = 1
    """Items, actions and context values seen fewer times become the out-of-vocabulary id 0."""
    include_unseen: bool = False
    """Also keep items of the item file that the log never mentions, so that they can be recommended."""
    split: Literal["leave_one_out", "time"] = "leave_one_out"
    """What validation and test are: the last two events of every user, or all events from `valid_from` on."""
    valid_from: str | int | None = None
    """With split time: when validation begins, a date or time in UTC (2015-01-31, 2015-01-31T12:00) or unix seconds.
    Nothing from then on is counted, numbered or trained on."""
    test_from: str | int | None = None
    """With split time: when the test begins."""
    holdout: int = 2
    """With split leave_one_out: last events of every user that item counts and co-occurrence must not see."""
    extend: Path | None = None
    """Directory of older features: its ids keep their meaning, whatever else reaches min_count gets ids behind them."""
    rating_buckets: int = 10
    """Most action tokens made from ratings: one per distinct rating, or as many quantiles if there are more."""
    weight_buckets: int = 10
    """Most buckets of the weight: one per distinct number, or as many quantiles of the training events."""
    text_dim: int = 128
    """Feature dimensions from item text; all of text_dim + cooccurrence_dim where nothing co-occurs."""
    cooccurrence_dim: int = 128
    """Feature dimensions from what is consumed close together; all of both where items have no text."""
    text_encoder: Literal["tfidf", "minilm"] = "tfidf"
    """tfidf: word 1–2-grams and SVD. minilm: sentence embeddings and SVD, needs pip install 'genrec[text]'."""
    window: int = 5
    """Two events this close in a history co-occur, with weight 1 / distance; at most 20."""
    max_pairs: int = 5_000_000
    """Most pairs of items that co-occurrence features are made of, those that weigh most; this bounds their memory."""
    seed: int = 0
    """Seed of the randomised SVD."""
    rows_per_file: int = 100_000
    """Users per file of sequences."""
    format: Literal["parquet", "tfrecord", "tfrecord.gz"] = "parquet"
    """Files of sequences: Parquet, which genrec reads, or one tf.train.Example a user, for other loaders."""
    engine: Literal["duckdb", "spark"] = "duckdb"
    """What runs the pipeline: DuckDB here, or Spark, here or on a cluster (pip install 'genrec[spark]', and Java 17).
    The output does not depend on it."""
    spark: dict[str, str | int] = field(default_factory=dict)
    """Settings of Spark, such as {spark.master: yarn}; without a master, here or from spark-submit, it runs here."""
    threads: int | None = None
    """Threads of DuckDB, or of Spark where it runs here; all if not given. The output does not depend on it."""
    memory_limit: str | None = None
    """Memory the process may take before it spills to disk, such as 1GB, with Spark that of its driver; 80 % of the
    machine's for DuckDB if not given."""

    def __post_init__(self) -> None:
        least = {"max_malformed": 0, "min_events": 1, "max_events": 1, "min_count": 1, "holdout": 0}
        least |= {"rating_buckets": 1, "text_dim": 0, "cooccurrence_dim": 0, "window": 1, "rows_per_file": 1}
        least |= {"max_pairs": 1, "weight_buckets": 1, "session_gap": 0, "hash_buckets": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {bound}")
        if self.text_dim + self.cooccurrence_dim == 0:
            raise ValueError("text_dim and cooccurrence_dim are both 0; expected at least one feature dimension")
        if self.window > 20:
            raise ValueError(f"window is {self.window}; expected at most 20")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; expected at least 1")
        for name in ("valid_from", "test_from"):
            if (getattr(self, name) is None) == (self.split == "time"):
                expected = "a time" if self.split == "time" else "none"
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected} with split {self.split}")
        self.cuts()  # refuses times that are none

    def cuts(self) -> Split:
        """What `split`, `valid_from` and `test_from` say."""
        if self.valid_from is None or self.test_from is None:
            return LeaveOneOut()
        return ByTime(parse_time("valid_from", self.valid_from), parse_time("test_from", self.test_from))

    @property
    def events_name(self) -> str:
        """The input as messages call it."""
        return ", ".join(map(str, _listed(self.events)))

    @property
    def items_name(self) -> str:
        """The item file as messages call it, empty if there is none."""
        return ", ".join(map(str, _listed(self.items)))

    def to_json(self) -> dict[str, Any]:
        """The settings that decide the output: file names without folders, nothing about this machine."""
        settings = asdict(self) | {"events": _names(self.events), "items": _names(self.items)}
        return {name: value for name, value in settings.items() if name not in _NOT_CONTENT}


_NOT_CONTENT = {"out", "overwrite", "extend", "engine", "spark", "threads", "memory_limit"}


def _listed(paths: list[Path] | Path | None) -> list[Path]:
    return [] if paths is None else [paths] if isinstance(paths, Path) else list(paths)


def _names(paths: list[Path] | Path | None) -> list[str] | str | None:
    names = [path.name for path in _listed(paths)]
    return names if isinstance(paths, list) else next(iter(names), None)
