"""What every hostile test needs: rounds with seeds and counts, a corpus, the means of a hostile program."""
