// Z = act(ρ(T, V)) and its backward, on rank-wide rows: the part of the layer between the two projections.
#pragma once

#include "cpu/condition.h"
#include "cpu/segments.h"

namespace routed_peft::cpu {

// z [rows, R] from t [rows, R]. With `g`, the gradient of z, g is turned into that of ρ: g ∘ act'(ρ). Like dt below, z
// may be bfloat16 where Acc is float; it is rounded once.
template <class Acc>
void route_forward(const Host& host, const Problem& p, const State<Acc>& state, const Matrix& t, const Segments& cuts,
                   const Matrix& z, Acc* g);

// dt [rows, R] and the gradient of the state (its layout; V's for a state of tokens) from g, the gradient of ρ, and
// z = ρ again. Each of the three may be absent. dstate is of Acc; for gram on V, it may be bfloat16 where every
// condition has one segment at most.
template <class Acc>
void route_backward(const Host& host, const Problem& p, const State<Acc>& state, const Matrix& t, const Segments& cuts,
                    const Acc* g, const Matrix& dt, const Matrix& dstate, const Matrix& z);

}  // namespace routed_peft::cpu
