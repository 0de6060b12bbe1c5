"""What `serve run serve_apps.recommender:app bundle=…` runs: arguments in, the serving graph out."""

from elasticrec.serving.graph import Args, app

__all__ = ["Args", "app"]
