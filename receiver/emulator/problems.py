"""Refusals in FLORA's form: an exception with an HTTP status and FLORA's error body."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.responses import JSONResponse

__all__ = ["ApiProblem", "Field", "invalid_input", "not_found"]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a request and its problem."""

    field: str
    message: str


class ApiProblem(Exception):  # noqa: N818  # FLORA's response, not an error
    """A request that is refused with an error body. It never leaves the emulator."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        fields: Sequence[Field] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.fields = tuple(fields)
        self.headers = headers
        super().__init__(message)

    def response(self) -> JSONResponse:
        error: dict[str, object] = {"code": self.code, "message": self.message}
        if self.fields:
            error["fields"] = [{"field": one.field, "message": one.message} for one in self.fields]
        return JSONResponse({"error": error}, status_code=self.status, headers=self.headers)


def invalid_input(*fields: Field) -> ApiProblem:
    """Return the refusal (400) that names the invalid fields."""
    named = ", ".join(sorted({one.field for one in fields}))
    return ApiProblem(400, "input_validation_error", f"Invalid input: {named}", fields=fields)


def not_found(what: str) -> ApiProblem:
    return ApiProblem(404, "not_found", f"{what} not found")
