"""From a set that `transcoder export RUN --to circuit-tracer` wrote to an attribution graph and its page.

    python docs/attribution_graph.py SET "import os" graphs            # writes graphs/graph.pt, graph.json, features/
    python docs/attribution_graph.py SET "import os" graphs --serve    # and shows them on localhost:8032

Runs in circuit-tracer's environment (`pip install circuit-tracer "nnsight<0.7"`); this package is not needed there.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml


def replacement_model(folder: Path, model: str | None = None) -> tuple[Any, dict[str, Any]]:
    """circuit-tracer's model with the set's transcoders, and the set's config. `model`: a name or folder other than its own."""
    from circuit_tracer import ReplacementModel
    from circuit_tracer.utils.hf_utils import load_transcoders

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    layers = len(list(folder.glob("layer_*.safetensors")))
    config["transcoders"] = [str(folder / f"layer_{layer}.safetensors") for layer in range(layers)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transcoders = load_transcoders(config, device=device, lazy_decoder=False)
    # The backend transformerlens knows models by their names on the hub only, nnsight takes folders too.
    found = ReplacementModel.from_pretrained_and_transcoders(
        model or config["model_name"], transcoders, backend="nnsight", device=device
    )
    return found, config


def main() -> None:
    parser = argparse.ArgumentParser(description="an attribution graph of a prompt, by circuit-tracer")
    parser.add_argument("set", type=Path, help="the folder of the exported set")
    parser.add_argument("prompt")
    parser.add_argument("out", type=Path, help="the folder of the graphs")
    parser.add_argument("--model", help="the language model, if not the one that the set names")
    parser.add_argument("--serve", action="store_true", help="show the graph in a browser")
    given = parser.parse_args()
    # circuit-tracer looks for the folder that holds this one, which a bare name does not say.
    given.out = given.out.resolve()

    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_graph_scores
    from circuit_tracer.utils.create_graph_files import create_graph_files

    model, config = replacement_model(given.set, given.model)
    graph = attribute(given.prompt, model, batch_size=64, verbose=False)
    replacement, completeness = compute_graph_scores(graph)
    print(
        f"active features {len(graph.active_features)}, replacement score {replacement:.3f}, completeness {completeness:.3f}"
    )
    given.out.mkdir(parents=True, exist_ok=True)
    graph.to_pt(str(given.out / "graph.pt"))
    create_graph_files(graph, slug="graph", output_path=str(given.out), scan=config["scan"])
    if (given.set / "features").is_dir():
        shutil.copytree(given.set / "features", given.out / "features", dirs_exist_ok=True)
    if given.serve:
        from circuit_tracer.frontend.local_server import serve

        server = serve(str(given.out))
        input("http://localhost:8032/index.html  (Enter ends it) ")
        server.stop()


if __name__ == "__main__":
    main()
