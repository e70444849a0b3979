"""Keeps models that release 0.1.0 registered in MLflow working: their pyfunc script imports `sample_images` from here."""

from pipeline.models.sampling import sample_images

__all__ = ["sample_images"]
