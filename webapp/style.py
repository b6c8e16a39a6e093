"""The theme, style sheet and keys of the page; system fonts only, so that the page needs no network."""

from pathlib import Path

import gradio as gr

RUST = gr.themes.Color(
    name="rust", c50="#fdf5ef", c100="#fae6d8", c200="#f4ccb2", c300="#ecab83", c400="#e38a57", c500="#c8622d",
    c600="#a94a1a", c700="#8c3b14", c800="#712f12", c900="#5b2711", c950="#331307",
)  # fmt: skip
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    """Gradio's plainest theme with one accent colour; page.css sets the other colours of its parts."""
    plain = gr.themes.Base(
        primary_hue=RUST, secondary_hue=RUST, neutral_hue="stone", font=SANS, font_mono=MONO, radius_size="sm"
    )
    return plain.set(body_background_fill="#fbfaf8", body_background_fill_dark="#161412")


def read_asset(name: str) -> str:
    """page.css, or page.js: Ctrl+Enter writes, Esc stops, and Stop removes the caret at once."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
