"""The picture of README.md: VQA accuracy and perplexity over file size, of a results.json of `spectrim pareto`.

python tools/picture.py RESULTS docs/pareto.svg
"""

import argparse
from pathlib import Path
from typing import Any

import vl_convert

from spectrim.report.charts import Series, pareto, series_of
from spectrim.report.reading import read

SHOWN = ("VQA accuracy by file size", "Perplexity by file size")


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    material = read([arguments.results])
    (frontier,) = material.frontiers
    report, points = frontier.evaluation, frontier.points(())
    series = Series([series_of(point, report.reference) for point in points])
    charts = pareto(points, report.reference, series, None if report.blind is None else report.blind.mean)
    views: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for chart in charts:
        if chart.title in SHOWN:
            config = chart.spec.pop("config")
            chart.spec.pop("$schema", None)
            for layer in chart.spec["layer"]:  # pages have a legend of their own
                for channel in ("color", "shape"):
                    if "field" in (found := layer.get("encoding", {}).get(channel, {})):
                        found["legend"] = {"title": None, "orient": "bottom", "columns": 5}
            views.append({**chart.spec, "width": 330, "height": 260, "title": chart.title})
    config.pop("autosize", None)
    spec = {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "hconcat": views, "config": config}
    arguments.picture.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")


if __name__ == "__main__":
    main()
