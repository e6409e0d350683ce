"""Draws docs/architecture.svg, the figure in the README: `python docs/architecture.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

plt.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "condenser", "font.size": 11}
CLS, TOKENS, LAYER, HEAD, INK = "#d55e00", "#0072b2", "#e8eef4", "#fdeedd", "#22303c"
X_CLS, X_TOKENS = 1.25, (2.35, 3.25, 4.15, 5.05)


def box(axes, x, y, width, height, text, face, edge=INK):
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0.02,rounding_size=0.08", fc=face, ec=edge, lw=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK)


def arrow(axes, start, end, colour, curve=0.0):
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "lw": 1.8, "color": colour, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={curve}", **style))


def upward(axes, low, high):
    for x in (X_CLS, *X_TOKENS):
        arrow(axes, (x, low), (x, high), CLS if x == X_CLS else TOKENS)


def draw():
    figure, axes = plt.subplots(figsize=(8.6, 5.6))
    words = ("dense", "[MASK]", "needs", "[MASK]")
    axes.text(X_CLS, 0.1, "[CLS]", ha="center", color=CLS)
    for x, word in zip(X_TOKENS, words, strict=True):
        axes.text(x, 0.1, word, ha="center", color=TOKENS)
    upward(axes, 0.4, 0.7)
    box(axes, 0.7, 0.72, 4.9, 0.75, "early layers   1 … skip_from", LAYER)
    upward(axes, 1.5, 2.0)
    box(axes, 0.7, 2.02, 4.9, 0.75, "late layers   skip_from + 1 … N", LAYER)
    upward(axes, 2.8, 3.25)
    axes.plot([X_CLS, X_CLS], [3.25, 4.1], color=CLS, lw=1.8)
    arrow(axes, (X_CLS, 4.1), (6.45, 4.1), CLS)
    axes.text(1.4, 4.22, "last [CLS]", color=CLS)
    axes.plot([X_TOKENS[0], 7.5], [1.75, 1.75], color=TOKENS, lw=1.8)
    arrow(axes, (7.5, 1.75), (7.5, 3.7), TOKENS)
    axes.text(7.65, 2.7, "early states of\nall other tokens", color=TOKENS, va="center")
    box(axes, 6.5, 3.74, 2.0, 0.75, "Condenser head\n2 fresh layers", HEAD, CLS)
    arrow(axes, (7.5, 4.52), (7.5, 4.95), INK)
    for x in (X_TOKENS[1], X_TOKENS[3]):
        arrow(axes, (x, 3.25), (x, 4.95), TOKENS)
    box(axes, 2.35, 4.97, 6.15, 0.6, "one MLM head, at the masked tokens only", LAYER)
    axes.text(4.15, 5.75, "MLM loss", ha="center", color=INK, weight="bold")
    axes.text(5.8, 5.75, "+", ha="center", color=INK, weight="bold")
    axes.text(7.5, 5.75, "head MLM loss", ha="center", color=INK, weight="bold")
    axes.set(xlim=(0.5, 9.4), ylim=(0, 6.05))
    axes.axis("off")
    return figure


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".svg")
    draw().savefig(target, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    print(f"wrote {target}")
