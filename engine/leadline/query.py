"""SQL over a run, its tables as Arrow data sets, and depths of points that were not in it."""

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import resources
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from leadline.errors import LeadlineError, one_line
from leadline.html import html_table
from leadline.new_points import KeptMember, as_rows
from leadline.store import TABLES, RunDirectory
from leadline.store.places import for_arrow, place_of
from leadline.store.tables import ROWS

if TYPE_CHECKING:
    import duckdb

    from leadline.report.charts import Charts

# How DuckDB reads files of the user's own, by the ends of their names.
READERS = {".parquet": "read_parquet", ".csv": "read_csv", ".csv.gz": "read_csv", ".tsv": "read_csv"}
# What the manifest of a finished run has.
WHOLE = ("name", "configuration", "data", "fingerprint", "versions", "files", "stages")


class Run:
    """A run that is stored. Tables are opened when they are asked for, and never changed."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.manifest: dict[str, Any] = directory.read_manifest()

    def __repr__(self) -> str:
        return f"<Run {self.manifest.get('name')} {self.manifest.get('status')} at {self.directory.root}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: what the run is, and its members."""
        manifest = self.manifest
        told = {"run": manifest.get("name"), "status": manifest.get("status"), "place": self.directory.root}
        told |= {"configuration": manifest.get("fingerprint"), "data": manifest.get("data", {}).get("fingerprint")}
        head = html_table({"": list(told), " ": list(told.values())})
        if not self.directory.has_table("members"):
            return head
        columns = ["member", "architecture", "n_train", "train_accuracy", "held_out_accuracy"]
        return head + html_table(self.members.to_table(columns=columns).to_pydict())

    @property
    def plot(self) -> "Charts":
        """Charts, a call each: `run.plot.plane()`. Raises LeadlineError for a run that is not finished."""
        from leadline.report.charts import Charts  # the drawing library takes a second to import

        return Charts(self)

    @cached_property
    def points(self) -> ds.Dataset:
        return self._dataset("points")

    @cached_property
    def members(self) -> ds.Dataset:
        return self._dataset("members")

    @cached_property
    def probes(self) -> ds.Dataset:
        return self._dataset("probes")

    @cached_property
    def ensemble(self) -> ds.Dataset:
        return self._dataset("ensemble")

    @cached_property
    def depths(self) -> ds.Dataset:
        """With a column `member`, which is the name of the file's folder."""
        return self._dataset("depths")

    @cached_property
    def votes(self) -> ds.Dataset:
        """With a column `member`, which is the name of the file's folder."""
        return self._dataset("votes")

    @cached_property
    def learning(self) -> ds.Dataset:
        """Of the members whose training was watched or logged, with a column `member` as depths have it."""
        return self._dataset("learning")

    def sql(
        self, query: str, tables: Mapping[str, str | Path] | None = None, values: Mapping[str, Any] | None = None
    ) -> pa.Table:
        """The answer to one SELECT over the tables, by their names (DuckDB's SQL). Nothing else can be read or written.

        tables: files of the user's own by the names that the query gives them, Parquet (.parquet) or CSV (.csv,
        .csv.gz, .tsv), on this machine. values: what stands for each $name in the query.
        Raises LeadlineError for anything but one SELECT, for SQL that DuckDB refuses, for a run that is not finished,
        for damaged tables, and for files that are not there, are no tables, or have a name of the run's tables.
        """
        with self._answer(query, tables or {}, values) as answer:
            return answer.to_arrow_table()

    def batches(
        self, query: str, values: Mapping[str, Any] | None = None, seconds: float | None = None
    ) -> Generator[pa.RecordBatch]:
        """The answer of `sql` some rows after others, so that not all of them are in memory, nor all are computed.

        seconds: until an answer that is not there is given up. Raises LeadlineError then, and as `sql` does.
        """
        with self._answer(query, {}, values, seconds) as answer:
            yield from answer.to_arrow_reader(ROWS)

    @contextmanager
    def _answer(
        self,
        query: str,
        tables: Mapping[str, str | Path],
        values: Mapping[str, Any] | None,
        seconds: float | None = None,
    ) -> Iterator["duckdb.DuckDBPyRelation"]:
        """What DuckDB will answer, for as long as the block lasts; what goes wrong in it too raises LeadlineError."""
        import duckdb  # it complains when a process that asks nothing, but had Ray, ends

        self.refuse_unfinished()
        with duckdb.connect() as connection:
            try:
                statements = connection.extract_statements(query)
            except duckdb.Error as error:
                raise LeadlineError(f"query: {one_line(error)}") from None
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise LeadlineError("query: runs are read-only; give one SELECT statement")
            # Those alone that it may be about: one that is damaged is in the way of no other.
            asked = [name for name in TABLES if re.search(rf"\b{name}\b", query, re.IGNORECASE)] or TABLES
            for name in asked:
                if self.directory.has_table(name):
                    self._offer(name, connection)
            own = {name: _own_table(name, path, connection) for name, path in tables.items()}
            if isinstance(self.directory.root, Path):
                connection.execute(f"SET allowed_directories = [{quoted(str(self.directory.root) + '/')}]")
            connection.execute(f"SET allowed_paths = {_list_of(own.values())}")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            timer = Timer(seconds or 0, connection.interrupt)
            if seconds is not None:
                timer.start()
            try:
                yield self._asked(query, values, asked, connection)
            except (duckdb.Error, OSError, pa.ArrowException) as error:
                if timer.finished.is_set():
                    raise LeadlineError(f"query: given up after {seconds:g} s; ask for less") from None
                raise LeadlineError(
                    f"query: {one_line(error)}; where the query is right, see what leadline verify says"
                ) from None
            finally:
                timer.cancel()

    def _asked(
        self,
        query: str,
        values: Mapping[str, Any] | None,
        names: Sequence[str],
        connection: "duckdb.DuckDBPyConnection",
    ) -> "duckdb.DuckDBPyRelation":
        """What a query about tables of these names will answer."""
        import duckdb

        try:
            return connection.sql(query, params=values)
        except duckdb.CatalogException as error:
            missing = [name for name in names if names != TABLES and not self.directory.has_table(name)]
            raise self._missing(missing[0]) if missing else LeadlineError(f"query: {one_line(error)}") from None
        except duckdb.Error as error:
            raise LeadlineError(f"query: {one_line(error)}") from None

    def refuse_unfinished(self) -> None:
        """Raises LeadlineError where not all of its tables are there, or its manifest has lost a part."""
        status = self.manifest.get("status")
        if status != "complete":
            raise LeadlineError(f"{self.directory.root}: the run is {status}; finish it with the command that began it")
        missing = [key for key in WHOLE if key not in self.manifest]
        if missing:
            raise LeadlineError(f"{self.directory.manifest_path}: damaged (no {missing[0]}); restore it")

    def depth_of(
        self, member: str, points: Any = None, *, embeddings: Sequence[Any] | None = None, predictions: Any = None
    ) -> pa.Table:
        """Prediction depths of Q new points in one member of a finished run that had `engine.keep_indexes: true`.

        Give `points` [Q, ...], inputs as the run's own are read (scaled, resized, normalised alike), which go through
        the member; or what the member says of them: `embeddings`, [Q, width] for every probe in order, and
        `predictions` int [Q]. Every probe is searched by the method that the run searched it by. New points are in no
        bank: nothing is left out of their neighbours.

        Returns one row a point: prediction int32, depth int16, unsettled bool, and the votes winner, winner_votes,
        runner_up, runner_up_votes, fixed-size lists of int32 over the probes. Raises LeadlineError for an unknown
        member, a run that has kept no banks, sizes that do not agree, values that are not finite, and files whose
        SHA-256 is not the manifest's.
        """
        kept = KeptMember(self.directory, self.manifest, member)
        if (points is None) == (embeddings is None) or (embeddings is None) != (predictions is None):
            raise LeadlineError("depth_of: give points, or embeddings and predictions")
        if embeddings is None:
            return kept.depths(*kept.embed(as_rows(points, "points")))
        rows = [as_rows(values, f"embeddings[{i}]") for i, values in enumerate(embeddings)]
        return kept.depths([values.reshape(len(values), -1) for values in rows], np.asarray(predictions))

    def _offer(self, name: str, connection: "duckdb.DuckDBPyConnection") -> None:
        """Let SQL know a table by its name: a query reads those files, and of these those row groups, that it needs.

        What lies in an object store is read by Arrow: DuckDB's own way there is an extension, which it would have to
        download.
        """
        import duckdb

        if isinstance(self.directory.root, Path):
            files = _list_of(self.directory.files(name))
            try:
                connection.execute(
                    f"CREATE VIEW {name} AS SELECT * FROM read_parquet({files}, hive_partitioning = true, "
                    "hive_types_autocast = false)"
                )
            except duckdb.Error as error:
                raise self._unreadable(name, error) from None
            return
        # Lists of any length, as DuckDB reads them from files: members differ in their number of probes.
        fields = [
            pa.field(field.name, pa.list_(field.type.value_type)) if pa.types.is_fixed_size_list(field.type) else field
            for field in self._dataset(name).schema
        ]
        connection.register(name, self._dataset(name, pa.schema(fields)))

    def _dataset(self, name: str, schema: pa.Schema | None = None) -> ds.Dataset:
        """schema: to read it as; by default that of its first file."""
        if not self.directory.has_table(name):
            raise self._missing(name)
        member = pa.schema([("member", pa.string())])
        path, filesystem = for_arrow(self.directory.table(name))
        # Of a file for each member, in a folder of its name; the other tables are one file and have no such column.
        parts = None if path.endswith(".parquet") else ds.partitioning(member, flavor="hive")
        try:
            return ds.dataset(path, schema, format="parquet", filesystem=filesystem, partitioning=parts)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(name, error) from None

    def _missing(self, name: str) -> LeadlineError:
        status = self.manifest.get("status")
        if name == "learning" and status == "complete":
            return LeadlineError(
                f"{self.directory.root}: has no table learning, no training in it was watched; give members "
                "training.learning in a new run, or leadline import the log of a training elsewhere"
            )
        if status == "complete":
            return LeadlineError(f"{self.directory.table(name)}: missing; see what leadline verify says")
        return LeadlineError(
            f"{self.directory.root}: has no table {name} yet, the run is {status}; "
            "finish it with the command that began it"
        )

    def _unreadable(self, name: str, error: Exception) -> LeadlineError:
        return LeadlineError(
            f"{self.directory.table(name)}: cannot be read ({one_line(error)}); see what leadline verify says"
        )


def open_run(uri: str | Path) -> Run:
    """A run, to be read: its directory, or s3://bucket/prefix or gs://bucket/prefix.

    Raises LeadlineError where there is none.
    """
    return Run(RunDirectory(place_of(uri)))


def named_queries() -> dict[str, str]:
    """The SQL of the queries that come with the package, by name; the first line of each says what it answers."""
    files = (resources.files("leadline") / "queries").iterdir()
    return {file.name.removesuffix(".sql"): file.read_text() for file in sorted(files, key=lambda file: file.name)}


def named_query(name: str) -> str:
    """The SQL of one of them, for `Run.sql`. Raises LeadlineError for an unknown name."""
    known = named_queries()
    if name not in known:
        raise LeadlineError(f"--named: no query is called {name!r}; there are {', '.join(known)}")
    return known[name]


def quoted(text: str) -> str:
    """Text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _list_of(paths: Iterable[Path]) -> str:
    """Paths as SQL writes a list of them."""
    return f"[{', '.join(quoted(str(path)) for path in paths)}]"


def _own_table(name: str, path: str | Path, connection: "duckdb.DuckDBPyConnection") -> Path:
    """Let SQL know a file of the user's by a name. Returns its path."""
    import duckdb

    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise LeadlineError(f"--with {name}={path}: {name!r} is no name of a table; use letters, digits and _")
    if name.lower() in TABLES:
        raise LeadlineError(f"--with {name}={path}: the run has a table {name.lower()}; give yours another name")
    place = Path(path).absolute()
    reader = next((reader for ending, reader in READERS.items() if place.name.endswith(ending)), None)
    if reader is None:
        raise LeadlineError(f"--with {name}={path}: no table; give a file that ends in {', '.join(READERS)}")
    if not place.is_file():
        raise LeadlineError(f"--with {name}={path}: no such file on this machine")
    try:
        connection.execute(f'CREATE VIEW "{name}" AS SELECT * FROM {reader}({quoted(str(place))})')
    except duckdb.Error as error:
        raise LeadlineError(f"--with {name}={path}: cannot be read ({one_line(error)}); give another file") from None
    return place
