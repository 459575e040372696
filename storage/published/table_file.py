"""One file of a published table, which may lack columns."""

from typing import Any

import pyarrow as pa

from ..bounds import integer, mapping, parsed
from ..errors import IntegrityError
from ..tables.schema import SCHEMAS, since
from ..tables.shard import METADATA_KEY, ShardFile

HELP = "Get another copy of it, or publish it again."


class PublishedFile(ShardFile):
    """One file of a published table, which may lack columns."""

    def _read_about(self) -> dict[str, Any]:
        try:
            about = mapping(parsed(self.stored.metadata[METADATA_KEY]))
            expected = SCHEMAS[about["table"]]
            integer(about["format_version"])
        except (TypeError, KeyError, ValueError) as error:
            raise IntegrityError(
                f"{self.name}: not a published table (no `stillroom` metadata). {HELP}"
            ) from error
        for field in self.stored:
            if field.name in expected.names and not field.type.equals(
                expected.field(field.name).type
            ):
                raise IntegrityError(
                    f"{self.name}: column {field.name} holds {field.type}, expected "
                    f"{expected.field(field.name).type}. Use the version of Stillroom that "
                    "published it."
                )
        return dict(about)

    def _read_as(self) -> pa.Schema:
        """The stored columns and those that later versions added, which are null here."""
        version, table = self.about["format_version"], self.about["table"]
        later = [
            field
            for field in SCHEMAS[table]
            if since(field) > version and field.name not in self.stored.names
        ]
        return pa.schema([*self.stored, *later], metadata=self.stored.metadata)
