"""The report as one self-contained HTML file, rendered from the templates in report/templates/."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import yaml

from headwater.report import html_arms, html_contrasts, html_curves, html_labels, html_stages, html_time
from headwater.report.figures import Plot
from headwater.report.headline import headline, stops
from headwater.report.render import render
from headwater.report.rollouts import sample
from headwater.report.stages import stage_name
from headwater.report.study import Study
from headwater.report.view import Column, Section, Table


@dataclass(frozen=True, slots=True)
class Page:
    """The text of report.html, and all figures for the folder figures/."""

    html: str
    plots: tuple[Plot, ...] = ()


def page(study: Study, report: dict[str, Any]) -> Page:
    """Render the report. Sections without content are left out."""
    candidates = [
        html_arms.arms(report),
        html_contrasts.predictions(report),
        html_labels.labels(study, report),
        html_contrasts.ideas(report),
        html_contrasts.comparisons(report),
        html_arms.costs(report),
        html_stages.stages(report),
        html_stages.conditions(study, report),
        html_curves.curves(study),
        html_time.time(study),
        _warnings(report),
        _rollouts(study),
        html_labels.audit_section(study),
        _sources(study),
    ]
    sections = [section for section in candidates if section is not None]
    plots = tuple(plot for section in sections for plot in section.plots)
    if plots:
        files = [(plot.name, plot.description.split(":")[0][:120]) for plot in plots]
        sections.append(Section("Files", "files", {"files": files}))
    values = {
        "report": report,
        "stops": stops(study, report),
        "headline": headline(report),
        "chips": html_contrasts.chips(report),
        "sections": sections,
    }
    return Page(render("report.html.j2", values), plots)


def _warnings(report: dict[str, Any]) -> Section | None:
    """The guards that began to warn during training, or stopped their stage."""
    columns = [
        Column("guard", lambda row: f"{row['guard']}{' (stopped)' if row['action'] == 'stop' else ''}"),
        Column("stage", lambda row: stage_name(row["stage"])),
        Column("arms", lambda row: ", ".join(row["arms"])),
        Column("seed", lambda row: str(row["seed"]), "right"),
        Column("step", lambda row: str(row["step"]), "right"),
        Column("what it measured", itemgetter("sentence")),
    ]
    rows = report["warnings"]
    return Section("Warnings", "warnings", {"table": Table("Guards", columns, rows, cards=True)}) if rows else None


def _rollouts(study: Study) -> Section | None:
    """The rollout browser: a form, and the sample of rollouts that browse.js lists."""
    sampled = sample(study)
    return Section("Rollouts", "rollouts", {"sample": sampled}) if sampled.rows else None


def _sources(study: Study) -> Section:
    recipe = yaml.safe_dump(study.recipe, sort_keys=False, allow_unicode=True, width=100)
    columns = [Column("name", itemgetter(0)), Column("value", lambda item: str(item[1]))]
    table = Table("Environment", columns, list(study.env.items()))
    return Section("Recipe and environment", "sources", {"recipe": recipe, "environment": table})
