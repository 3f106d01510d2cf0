"""From `transcoder train` to circuit-tracer's own attribution graph, by the steps of docs/circuit-tracing.md."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "circuit_tracer", reason="circuit-tracer is not installed here: python tests/interop/run.py circuit-tracer"
)
ROOT = Path(__file__).resolve().parents[3]
PORT = 8719


def example() -> Any:
    """docs/attribution_graph.py."""
    spec = importlib.util.spec_from_file_location("attribution_graph", ROOT / "docs" / "attribution_graph.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/interop/set_to_trace.py makes."""
    trainer = os.environ.get("TRANSCODER_PYTHON")
    if trainer is None:
        pytest.skip(
            "TRANSCODER_PYTHON names no Python to train with: python tests/interop/run.py circuit-tracer sets it"
        )
    folder = tmp_path_factory.mktemp("traced")
    subprocess.run([trainer, str(ROOT / "tests" / "interop" / "set_to_trace.py"), str(folder)], check=True)
    return folder


def test_the_graph_is_made_and_opened_by_its_viewer(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from circuit_tracer.frontend import feature_models, graph_models
    from circuit_tracer.frontend.local_server import serve
    from circuit_tracer.graph import Graph

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attribution_graph.py", str(made / "set"), "import os", "graphs"])
    example().main()
    graph = Graph.from_pt(str(tmp_path / "graphs" / "graph.pt"))
    assert len(graph.active_features) > 0
    server = serve(str(tmp_path / "graphs"), port=PORT)
    try:

        def get(name: str) -> Any:
            with urllib.request.urlopen(f"http://localhost:{PORT}/{name}") as answer:
                return json.loads(answer.read())

        (listed,) = get("data/graph-metadata.json")["graphs"]
        shown = graph_models.Model.model_validate(get(f"graph_data/{listed['slug']}.json"))
        features = [node for node in shown.nodes if node.feature_type == "cross layer transcoder"]
        assert features
        # The page asks for `scan` + "/" + the node's number where scan begins with a point.
        assert shown.metadata.scan == "./data/features"
        for node in features[:20]:
            found = feature_models.Model.model_validate(get(f"data/features/{node.feature}.json"))
            layer, latent, _ = node.node_id.split("_")
            assert (found.transcoder_id, found.index) == (layer, int(latent))
            assert found.examples_quantiles
    finally:
        server.stop()


@torch.no_grad()
def test_the_replacement_model_errs_as_our_evaluation_says(made: Path) -> None:
    from nnsight import save

    said = json.loads((made / "evaluation.json").read_bytes())
    theirs, _ = example().replacement_model(made / "set")
    tokens = torch.tensor(said["tokens"])
    errors = theirs.setup_attribution(tokens[0]).error_vectors[:, 1:].square().sum((1, 2))
    torch.testing.assert_close(errors, torch.tensor(said["errors"]), rtol=0.01, atol=0)
    # And the next token's cross-entropy with every layer's output replaced by its transcoders.
    losses = []
    for text in tokens:
        with theirs.trace(text):
            for layer in range(len(errors)):
                x = theirs.get_feature_input_loc(layer).output
                theirs.get_feature_output_loc(layer).output = theirs.transcoders._module[layer](x)
            logits = save(theirs.output.logits)
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1].float(), text[1:], reduction="none"))
    costs, replaced = said["set/ce_transcoder"] - said["set/ce_model"], float(torch.cat(losses).mean())
    print(errors.tolist(), said["errors"], replaced, said["set/ce_transcoder"], said["set/ce_model"])
    assert replaced - said["set/ce_model"] == pytest.approx(costs, rel=0.01)
