"""The routes are what their OpenAPI description says, whatever they are sent."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.server.api_rows import begin, row, upload
from tests.server.instant_server import Api
from tests.sizes import sized

ROUTES = [
    ("/v1/files", "POST"),
    ("/v1/files", "GET"),
    ("/v1/files/{file_id}", "GET"),
    ("/v1/files/{file_id}", "DELETE"),
    ("/v1/files/{file_id}/content", "GET"),
    ("/v1/batches", "POST"),
    ("/v1/batches", "GET"),
    ("/v1/batches/{batch_id}", "GET"),
    ("/v1/batches/{batch_id}", "DELETE"),
    ("/v1/batches/{batch_id}/cancel", "POST"),
]


@pytest.fixture(scope="module")
def schema(api: Api) -> Any:
    begin(api.client, [row(0)])  # something to list
    return schemathesis.openapi.from_url(f"{api.url}/openapi.json")


def test_every_route_is_described_with_its_errors(api: Api) -> None:
    paths = httpx.get(f"{api.url}/openapi.json").json()["paths"]
    assert sorted((path, name.upper()) for path, item in paths.items() for name in item) == sorted(ROUTES)
    for path, method in ROUTES:
        responses = paths[path][method.lower()]["responses"]
        assert {"200", "400", "401", "503"} <= set(responses)
        assert "422" not in responses


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    # Where there is only an id in the path, any text is one.
    [(*route, mode) for route in ROUTES for mode in GenerationMode if mode.is_positive or "{" not in route[0]],
)
def test_every_answer_to_any_request_is_one_that_is_described(
    api: Api, schema: Any, path: str, method: str, mode: GenerationMode
) -> None:
    """Above all no 5xx; right statuses, types and bodies of answers."""
    file_id = upload(api.client, [row(0)])

    @settings(max_examples=sized(25, 30), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=mode), is_there=st.booleans())
    def check(case: Any, is_there: bool) -> None:
        if is_there:
            case.path_parameters = {name: file_id for name in case.path_parameters or {}}
        case.call_and_validate(timeout=60)

    check()
