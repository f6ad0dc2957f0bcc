"""The time that documents carry: now, or the moment that makes a build reproducible."""

import os
from datetime import UTC, datetime

from lora_hub.errors import InputError


def timestamp() -> str:
    """Return now as RFC 3339 in UTC; SOURCE_DATE_EPOCH takes its place where it is set.

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time.

    Source: https://reproducible-builds.org/specs/source-date-epoch/.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(
            f"{epoch!r} is no time, expected seconds since 1970", where="SOURCE_DATE_EPOCH"
        ) from error
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
