/* Which rows an expert has. A place is one of a token's slots, its experts: token * slots + slot. */
struct ExpertItem {
    int expert, first, count; /* rows of the list from `first` on */
};

__device__ __forceinline__ ExpertItem RoutingView::item(int i) const
{
    return {items[i * 3], items[i * 3 + 1], items[i * 3 + 2]};
}

/* The token that a place of the list is of. */
__device__ __forceinline__ int RoutingView::token(int row) const { return places[row] / slots; }

/* Where the result of a place goes in planes [slots, tokens, hidden], before it is multiplied by `hidden`. */
__device__ __forceinline__ size_t RoutingView::row_of_planes(int place) const
{
    return (size_t)(place % slots) * tokens + place / slots;
}
