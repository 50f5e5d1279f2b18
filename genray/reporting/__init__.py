"""What finished runs and evaluations are shown as: tables, files and plots."""
