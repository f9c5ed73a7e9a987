"""Every error this program raises on purpose.

    RecontrolError                     a code and an HTTP status for each leaf
    |-- InvalidRequestError      400   the caller can mend the request
    |   |-- ContextLengthError   400   prompt and max_tokens do not fit the model
    |   |-- InvalidJsonError     400   a body that is not JSON in UTF-8
    |   |-- SchemaTooComplexError 400  a text has come where its schema allows more at once than is affordable
    |   `-- UnsupportedFieldError 400  a known field that this server refuses, with the reason
    |-- AuthenticationError      401   no key, or one that does not open this path
    |-- PermissionDeniedError    403   the key opens this path, but not for what was asked
    |-- NotFoundError            404
    |   |-- UnsupportedPathError 404   a path of OpenAI's that this server does not have, with what it has instead
    |   |-- UnknownHeadError     404   lists the heads that exist
    |   |-- UnknownModelError    404   lists the model ids that exist
    |   `-- UnknownJobError      404
    |-- HeadConflictError        409   a head or a file of that name is there, or it is pinned
    |   `-- ReadOnlyHeadsError   409   the folder of heads cannot be written
    |-- LateCancelError          409   a job that is past its cancelling
    |-- SlowBodyError            408   a body that did not come in time
    |-- BodyTooLargeError        413
    |-- MediaTypeError           415   a body that is not JSON
    |-- ContentEncodingError     415   a body that is compressed in a way this server does not know
    |-- HeadersTooLargeError     431
    |-- OverloadedError          429   the waiting queue is full
    |   `-- RateLimitError       429   the caller's own limit is reached
    |-- EngineStoppedError       503   the loop has ended or never started
    |   `-- ShuttingDownError    503   what runs may finish; nothing new begins
    |-- DeadlineExceededError    504   the request's own deadline has passed
    |   `-- SlowReaderError      504   too much of a stream waits for a client that does not read it
    |-- GenerationError          500   one request failed inside the engine; others go on
    `-- ConfigurationError       500   the server or a command was set up wrongly
        |-- ModelLoadError       500   no such model, or one this server cannot run
        `-- HeadMismatchError    500   a value head that was made for another model

Knows nothing of HTTP frameworks: `server.api.handlers` turns these into responses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class RecontrolError(Exception):
    """Root. `message` is shown to the user; `param` names the request field at fault, if one is."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(RecontrolError):
    code = "invalid_value"
    status = 400


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class InvalidJsonError(InvalidRequestError):
    code = "invalid_json"


class SchemaTooComplexError(InvalidRequestError):
    code = "schema_too_complex"


class UnsupportedFieldError(InvalidRequestError):
    code = "unsupported_field"


class AuthenticationError(RecontrolError):
    code = "invalid_api_key"
    status = 401


class PermissionDeniedError(RecontrolError):
    code = "permission_denied"
    status = 403


class NotFoundError(RecontrolError):
    code = "not_found"
    status = 404


class UnsupportedPathError(NotFoundError):
    code = "unsupported_path"


class UnknownHeadError(NotFoundError):
    code = "head_not_found"

    def __init__(self, name: str, known: Iterable[str], *, param: str | None = None) -> None:
        listed = ", ".join(sorted(known)) or "none is loaded"
        super().__init__(f"There is no value head {name!r}. Known heads: {listed}.", param=param)


class UnknownModelError(NotFoundError):
    code = "model_not_found"

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"There is no model {name!r}. Known models: {', '.join(sorted(known))}.", param="model")


class UnknownJobError(NotFoundError):
    code = "job_not_found"


class HeadConflictError(RecontrolError):
    code = "head_conflict"
    status = 409


class LateCancelError(RecontrolError):
    code = "cancelled_too_late"
    status = 409


class ReadOnlyHeadsError(HeadConflictError):
    code = "heads_read_only"


class SlowBodyError(RecontrolError):
    code = "request_timeout"
    status = 408


class BodyTooLargeError(RecontrolError):
    code = "body_too_large"
    status = 413


class MediaTypeError(RecontrolError):
    code = "unsupported_media_type"
    status = 415


class ContentEncodingError(RecontrolError):
    code = "unsupported_content_encoding"
    status = 415


class HeadersTooLargeError(RecontrolError):
    code = "headers_too_large"
    status = 431


class OverloadedError(RecontrolError):
    """The queue is full. `retry_after_s` goes into the Retry-After header."""

    code = "overloaded"
    status = 429

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitError(OverloadedError):
    code = "rate_limit_exceeded"


class EngineStoppedError(RecontrolError):
    code = "engine_stopped"
    status = 503


class ShuttingDownError(EngineStoppedError):
    code = "shutting_down"


class DeadlineExceededError(RecontrolError):
    code = "deadline_exceeded"
    status = 504


class SlowReaderError(DeadlineExceededError):
    code = "slow_reader"


class GenerationError(RecontrolError):
    code = "generation_failed"


class ConfigurationError(RecontrolError):
    code = "configuration_error"


class ModelLoadError(ConfigurationError):
    code = "model_load_failed"


class HeadMismatchError(ConfigurationError):
    code = "head_mismatch"
