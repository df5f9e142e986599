// The ops' signatures. The emulator registers the same ones under a name of its own.
#pragma once

#define RP_TENSORS                                                                                                   \
  "Tensor x, Tensor A, Tensor B, Tensor? condition, Tensor? C, Tensor? weight, Tensor? bias, Tensor? b_down, "       \
  "Tensor? b_C, Tensor? mask, Tensor? index, Tensor? input_mask, Tensor? cu_seqlens, Tensor? condition_cu_seqlens, " \
  "Tensor? seed"
#define RP_NUMBERS                                                                                                \
  "SymInt samples, int routing, int source, int pool, int scale, int groups, int[] slices, SymInt out_features, " \
  "float scaling, float dropout, float condition_dropout, int activation, bool residual"
#define RP_CONDITION "Tensor y, Tensor C, Tensor? b_C, Tensor? mask, int routing, int pool, int scale, int groups"

namespace routed_peft {

template <class Library>
void define_ops(Library& m) {
  m.def("forward(" RP_TENSORS ", Tensor? base, " RP_NUMBERS ", int save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "infer(Tensor x, Tensor A, Tensor B, Tensor? condition, Tensor? weight, Tensor? bias, Tensor? base, "
      "Tensor? index, SymInt samples, int choices, int[] slices, SymInt out_features, float scaling) -> Tensor");
  m.def("backward(int needs, Tensor dout, Tensor T, Tensor state, Tensor kept, " RP_TENSORS ", " RP_NUMBERS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("encode(" RP_CONDITION ", bool save) -> (Tensor, Tensor)");
  m.def("encode_backward(int needs, Tensor dstate, Tensor kept, " RP_CONDITION ") -> (Tensor, Tensor, Tensor)");
}

}  // namespace routed_peft
