"""Which operating points are worth having."""


def pareto(points) -> list[tuple]:
    """The points that no other one matches or beats in both coordinates, from left to right."""
    return sorted({p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)})
