"""Tests of the report, the plots, the statistics and the results' folder, with golden texts beside them."""
