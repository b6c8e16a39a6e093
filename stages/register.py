"""Stage `register`: models, data/tokens and reports -> a complete MLflow run, a registered version and its aliases."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.config.params import load_params
    from pipeline.config.sections import RegistryConfig
    from pipeline.registry.register import register
    from pipeline.system.host import project_root

    config = load_params().section(RegistryConfig)
    done = register(project_root(), Path(), config)
    champion = "champion" if done["champion"] else "not champion"
    print(f"{done['model']} version {done['version']}, run {done['run_id']}: {champion}: {done['reason']}")
    if done["next_step"]:
        print(done["next_step"])


if __name__ == "__main__":
    run_stage(main)
