"""What is shown of a study after the sweep: tables, figures, the best model."""
