"""space_card: what is known of a registered version -> the README of its Space, which says how to publish it."""

from typing import Any

from pipeline.report.model_card import front_matter, is_shakespeare

GUIDE = """\
# {name}, version {version}

A GPT-2 that knows its training text by heart, on a page that shows what it writes and how much of that is memory.
The folder holds all that the page needs: the program (`app.py`, `webapp/`, `pipeline/`), and in `version/` the model
with its tokenizer, its training text as tokens and the figures of its training. Every file of model and text is checked
against its hash before it is used; nothing in them is executed.

## Try it here

```
python{python} -m venv ../venv
../venv/bin/pip install -r requirements.txt
../venv/bin/python app.py
```

The page is at http://127.0.0.1:7860, for this machine alone. The first line of `requirements.txt` asks for torch's
build for CPUs, much smaller than the one for GPUs: take it out on a GPU, and where pip cannot reach that address.

## Publish it

1. Make an account at https://huggingface.co and, under Settings, Access Tokens, a token that may write.
2. Install the Hub's command and log in with the token:

   ```
   pip install huggingface_hub
   hf auth login
   ```

3. Create the Space, under your own name in place of YOU; `--private` hides it:

   ```
   hf repos create YOU/{name} --type space --sdk gradio
   ```

4. Upload this folder, {size_mb:,.0f} MB, from within it; its large files find their storage by themselves:

   ```
   hf upload YOU/{name} . . --type space
   ```

5. Open https://huggingface.co/spaces/YOU/{name}: it says "Building" for some minutes, while the requirements are
   installed, then shows the page. What goes wrong stands under Logs.

With git in place of steps 3 and 4, after creating the Space on the website (SDK: Gradio):

```
git lfs install
git clone https://huggingface.co/spaces/YOU/{name} ../clone
cp -R . ../clone
cd ../clone
git lfs track "*.safetensors" "*.bin"
git add . && git commit -m "Version {version}" && git push
```

## Hardware and cost

- "CPU basic", two cores and 16 GB of memory, is free of charge and enough. It sleeps after two days without a visitor
  and wakes with the next one, who waits a minute.
- More cores or a GPU, under Settings, are paid by the hour as long as the Space runs, visited or not, unless a sleep
  time is set there: https://huggingface.co/pricing.
- `requirements.txt` names exact versions, and the block on top of this file those of Python and Gradio: raise them
  together, and try them here first.

## Update it

Export the next version into a new folder, and upload that to the same Space; what it no longer has is removed:

```
python -m pipeline export space NEW_FOLDER
cd NEW_FOLDER
hf upload YOU/{name} . . --type space --delete "*"
```

The Space builds itself again after each upload. To go back, do the same with `export space --version N`.

## Licence

{licence}
"""
SHAKESPEARE = "MIT, see LICENSE. The training text, by William Shakespeare, is in the public domain."
OTHER = """\
The program is under the MIT licence, see LICENSE. The training text is not, it lies in `version/tokens`, and the model
recites it: publish them only where you hold the rights in it, or may."""


def space_card(facts: dict[str, Any], gradio: str, python: str, size_bytes: int) -> str:
    """The README in Markdown with the front matter that configures the Space; `gradio`, `python`: their versions."""
    known = is_shakespeare(facts)
    configuration = {
        "title": f"{facts['name']}, version {facts['version']}",
        "emoji": "🎭",
        "colorFrom": "gray",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": gradio,
        "python_version": python,
        "app_file": "app.py",
        "suggested_hardware": "cpu-basic",
        "pinned": False,
        "license": "mit" if known else "other",
        "short_description": "A GPT-2 that knows its text by heart",  # 60 characters at most
    }
    text = GUIDE.format(
        name=facts["name"],
        version=facts["version"],
        python=python,
        size_mb=size_bytes / 1e6,
        licence=SHAKESPEARE if known else OTHER,
    )
    return front_matter(configuration) + text
