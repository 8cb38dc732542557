"""What measures this library, and what writes its pages from the measurements."""
