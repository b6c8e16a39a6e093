"""style: how the page looks -> a theme, a style sheet, a few keys; system fonts only, so that nothing is fetched."""

from pathlib import Path

import gradio as gr

ACCENT = gr.themes.Color(
    name="rust", c50="#fdf5ef", c100="#fae6d8", c200="#f4ccb2", c300="#ecab83", c400="#e38a57", c500="#c8622d",
    c600="#a94a1a", c700="#8c3b14", c800="#712f12", c900="#5b2711", c950="#331307",
)  # fmt: skip
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    """Gradio's plainest theme, with one accent colour and a paper that is not quite white."""
    base = gr.themes.Base(
        primary_hue=ACCENT, secondary_hue=ACCENT, neutral_hue="stone", font=SANS, font_mono=MONO, radius_size="sm"
    )
    return base.set(
        body_background_fill="#fbfaf8",
        body_background_fill_dark="#161412",
        body_text_color_subdued="#6a635b",
        body_text_color_subdued_dark="#a59c91",
        block_info_text_color="#6a635b",
        block_info_text_color_dark="#a59c91",
        block_label_text_color="#6a635b",
        block_label_text_color_dark="#a59c91",
        background_fill_primary_dark="#1d1b18",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_padding="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="500",
        block_title_text_size="*text_sm",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1d1b18",
        input_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_400",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#1a0f08",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#262320",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )


def css() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def keys() -> str:
    """A script of the page: Ctrl+Enter writes, Esc stops, a press on Stop takes the caret away at once."""
    return (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
