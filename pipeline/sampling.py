"""Where models that 0.1.0 registered in MLflow look for `sample_images`: their pyfunc script imports it from here."""

from pipeline.models.sampling import sample_images

__all__ = ["sample_images"]
