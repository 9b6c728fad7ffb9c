"""Packaging, read from settings.ini (one place for names, versions and requirements)."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def names(key):
    return cfg.get(key, "").split()


class BuildWithPapers(build_py):
    """Also copy notebooks, papers and stored runs: a clone reads them from nbs and results, an installed
    package from papers/data and papers/results."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        papers = Path(self.build_lib) / cfg["lib_path"] / "papers"
        copies = [(here / "nbs", papers / "data", (".ipynb", ".toml", ".csv", ".md"))]
        for name in ("runs", "bench", "measured", "tables", "weights"):
            copies.append(
                (
                    here / "results" / name,
                    papers / "results" / name,
                    (".json", ".md", ".csv", ".png", ".safetensors"),
                )
            )
        for folder, target, suffixes in copies:
            for source in sorted(folder.rglob("*")):
                # runs and tables at smoke scale are everybody's own
                is_own = (
                    source.name.startswith(("digits", "search-digits")) or "-smoke" in source.name
                )
                is_wanted = source.suffix in suffixes and ".ipynb_checkpoints" not in source.parts
                if is_wanted and not is_own:
                    copy = target / source.relative_to(folder)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, copy)


extras = {
    "lab": names("lab_requirements"),
    "extra": names("extra_requirements"),
    "export": names("export_requirements"),
    "book": names("book_requirements"),
    "dev": names("dev_requirements") + names("book_requirements"),
}
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8")
    if (here / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    cmdclass={"build_py": BuildWithPapers},
    packages=find_packages(include=["snnkd_nb", "snnkd_nb.*"]),
    package_data={cfg["lib_name"]: ["py.typed"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=names("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": names("console_scripts")},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
