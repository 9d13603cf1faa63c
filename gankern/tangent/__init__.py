"""The explicit second-order form of a gradient penalty: a tape, the rules of operators, and four passes."""
