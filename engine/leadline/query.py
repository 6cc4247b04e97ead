"""SQL over a run, its tables as Arrow data sets, and depths of points that were not in it."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from leadline.errors import LeadlineError, one_line
from leadline.html import html_table
from leadline.new_points import KeptMember, as_rows
from leadline.store import TABLES, RunDirectory
from leadline.store.places import for_arrow, place_of

if TYPE_CHECKING:
    import duckdb

    from leadline.report.charts import Charts


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

    def sql(self, query: str) -> pa.Table:
        """The answer to one SELECT over the tables, by their names (DuckDB's SQL). Nothing else can be read or written.

        Raises LeadlineError for anything but one SELECT, for SQL that DuckDB refuses, and for damaged tables.
        """
        import duckdb  # it complains when a process that asks nothing, but had Ray, ends

        with duckdb.connect() as connection:
            try:
                statements = connection.extract_statements(query)
            except duckdb.Error as error:
                raise LeadlineError(f"query: {one_line(error)}") from None
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise LeadlineError("query: runs are read-only; give one SELECT statement")
            for name in TABLES:
                if self.directory.has_table(name):
                    self._offer(name, connection)
            if isinstance(self.directory.root, Path):
                connection.execute(f"SET allowed_directories = [{quoted(str(self.directory.root) + '/')}]")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            try:
                return connection.sql(query).to_arrow_table()
            except duckdb.Error as error:
                raise LeadlineError(f"query: {one_line(error)}") from None

    def refuse_unfinished(self) -> None:
        """Raises LeadlineError where not all of its tables are there."""
        status = self.manifest.get("status")
        if status != "complete":
            raise LeadlineError(f"{self.directory.root}: the run is {status}; finish it with the command that began it")

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
        """Let SQL know a table by its name.

        What lies in an object store is read by Arrow, only what a query needs of it: DuckDB's own way there is an
        extension, which it would have to download.
        """
        if isinstance(self.directory.root, Path):
            files = quoted(self.directory.files(name))
            connection.execute(
                f"CREATE VIEW {name} AS SELECT * FROM read_parquet({files}, hive_partitioning = true, "
                "hive_types_autocast = false)"
            )
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
            if name == "learning" and self.manifest.get("status") == "complete":
                raise LeadlineError(
                    f"{self.directory.root}: has no table learning, no training in it was watched; give members "
                    "training.learning in a new run, or leadline import the log of a training elsewhere"
                )
            raise LeadlineError(
                f"{self.directory.root}: has no table {name} yet, the run is {self.manifest.get('status')}; "
                "finish it with the command that began it"
            )
        member = pa.schema([("member", pa.string())])
        path, filesystem = for_arrow(self.directory.table(name))
        parts = ds.partitioning(member, flavor="hive")
        try:
            return ds.dataset(path, schema, format="parquet", filesystem=filesystem, partitioning=parts)
        except OSError as error:
            raise LeadlineError(
                f"{self.directory.table(name)}: cannot be read ({one_line(error)}); see what leadline verify says"
            ) from None


def open_run(uri: str | Path) -> Run:
    """A run, to be read: its directory, or s3://bucket/prefix or gs://bucket/prefix.

    Raises LeadlineError where there is none.
    """
    return Run(RunDirectory(place_of(uri)))


def quoted(text: str) -> str:
    """Text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
