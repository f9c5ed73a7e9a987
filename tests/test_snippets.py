"""What the playground gives to copy is safe to paste into a shell, as Node runs the page's pure functions."""

import json
import shlex
import shutil
import subprocess

import pytest

ORIGIN = "http://$(touch${IFS}x)`id`';\"\\.example:8000"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_curl_snippet_quotes_an_origin_for_the_shell() -> None:
    script = (
        'import { curl, python } from "./server/playground/snippets.js";'
        f"const to = {{ baseUrl: {json.dumps(ORIGIN)}, hasKey: true }};"
        'const sent = { path: "completions", body: { prompt: "it\'s $(id)" } };'
        "console.log(JSON.stringify([curl(sent, to), python(sent, to)]));"
    )
    done = subprocess.run(
        ["node", "--input-type=module", "--no-warnings", "-e", script], capture_output=True, text=True, check=True
    )
    curl, python = json.loads(done.stdout)
    words = shlex.split(curl.replace("\\\n", " "))
    assert words[:3] == ["curl", "-N", f"{ORIGIN}/completions"]
    said = subprocess.run(["sh", "-c", f"printf '%s\\n' {curl}"], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[2] == f"{ORIGIN}/completions"
    assert json.loads(words[-1]) == {"prompt": "it's $(id)"}
    assert f"base_url={json.dumps(ORIGIN)}" in python
