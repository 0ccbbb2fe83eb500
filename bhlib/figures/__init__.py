"""Figures: one function draws each, from a table; one registry computes, saves, redraws and checks them all.

A figure is a pair of functions. ``compute(demo)`` makes the table, ``draw(table)`` makes a matplotlib Figure of it
and of nothing else, so that a figure can be redrawn from the CSV that lies beside it. Notebooks and sliders call the
same ``draw`` functions.

    from bhlib import figures
    figures.draw_stepup(figures.compute_stepup())
"""

from bhlib.figures.drawing import STYLE, Picture
from bhlib.figures.nulls import (
    compute_null_calibration,
    compute_softmax_theorem,
    draw_null_calibration,
    draw_softmax_theorem,
)
from bhlib.figures.passage import (
    Passage,
    PassageCharts,
    RoutedPassage,
    draw_passage,
    draw_passage_histogram,
    draw_passage_layers,
    draw_passage_text,
    draw_passage_weights,
    passage_html,
)
from bhlib.figures.quality import (
    compute_families_tried,
    compute_loss_vs_experts,
    compute_matched_compute,
    compute_statistic_matters,
    compute_whole_test_split,
    draw_families_tried,
    draw_loss_vs_experts,
    draw_matched_compute,
    draw_statistic_matters,
    draw_whole_test_split,
)
from bhlib.figures.registry import (
    ALPHAS,
    FIGURES,
    FREE,
    Demo,
    FigureSpec,
    check_figures,
    figure,
    make_figures,
    redraw_figures,
    save,
)
from bhlib.figures.routing import (
    compute_count_distribution,
    compute_expert_load,
    compute_experts_per_layer,
    compute_experts_vs_alpha,
    compute_token_layer_map,
    draw_count_distribution,
    draw_expert_load,
    draw_experts_per_layer,
    draw_experts_vs_alpha,
    draw_token_layer_map,
    passage_counts,
)
from bhlib.figures.speed import draw_speed
from bhlib.figures.theory import (
    PVALUES_1995,
    compute_fdr_simulation,
    compute_power_1995,
    compute_stepup,
    draw_fdr_simulation,
    draw_power_1995,
    draw_stepup,
)
from bhlib.figures.tokens import (
    compute_generation,
    compute_renormalization,
    compute_token_loss,
    draw_generation,
    draw_renormalization,
    draw_token_loss,
)
