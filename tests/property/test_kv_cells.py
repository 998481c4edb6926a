"""Where KV memory holds positions: KvCells against a table of each position's cell."""

from hypothesis import given
from hypothesis import strategies as st

from node.engine.llamacpp.kv_cells import KvCells


@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "cut", "drop", "share", "compact"]), *[st.integers(0, 12)] * 4), max_size=40
    )
)
def test_cells_are_those_of_a_table_of_positions(steps: list[tuple[str, int, int, int, int]]) -> None:
    cells, table, taken = KvCells(), {number: dict[int, int]() for number in range(3)}, 0
    for what, one, other, start, count in steps:
        of, by = table[one % 3], table[other % 3]
        end = max(of, default=-1) + 1
        match what:
            case "write":
                cells.write(one % 3, end, count)
                of |= {end + number: taken + number for number in range(count)}
                taken += count
            case "cut":
                cells.cut(one % 3, start)
                table[one % 3] = {position: cell for position, cell in of.items() if position < start}
            case "drop":
                cells.drop(one % 3, start, start + count)
                table[one % 3] = {p: cell for p, cell in of.items() if not start <= p < start + count}
            case "share" if of is not by:
                part = {p: cell for p, cell in by.items() if end <= p < end + count}
                follows = all(cell > max(of.values(), default=-1) for cell in part.values())
                assert cells.follows(other % 3, one % 3, end, end + count) == follows
                cells.share(other % 3, one % 3, end, end + count)
                of |= part
            case "compact":
                cells.compact()
                taken = 0
                for number in cells:  # in its own order
                    for position in sorted(table[number]):
                        table[number][position] = taken
                        taken += 1
        assert cells.held == sum(map(len, table.values()))
        assert cells.taken == taken
        assert [cells.end(number) for number in range(3)] == [max(each, default=-1) + 1 for each in table.values()]
