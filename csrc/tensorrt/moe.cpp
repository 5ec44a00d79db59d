// MoeRoute and MoeExperts; the launches mirror genrec/kernels/moe/triton_{route,order,experts}.py.
#include "operators.h"
#include "plugin.h"

#include <algorithm>

namespace genrec {
namespace {

// MoeRoute(logits (T, E), bias (E,); top_k, renormalize) → weights (T, k) float32, indices (T, k) int32
class MoeRoute final : public Plugin {
 public:
  const char* name() const noexcept override { return "MoeRoute"; }
  std::vector<Tensor> inputs() const override { return {{"logits", 'T', 2}, {"bias", 'T', 1}}; }
  std::vector<Tensor> outputs() const override { return {{"weights", 'f', 2}, {"indices", 'i', 2}}; }
  std::vector<Attribute> attributes() override {
    return {{"top_k", nullptr, &top_k_}, {"renormalize", nullptr, &renormalize_}};
  }
  void check_attributes() const override {
    require(top_k_ >= 1, "top_k is " + std::to_string(top_k_) + "; expected 1 or more");
    require(renormalize_ == 0 || renormalize_ == 1, "renormalize is " + std::to_string(renormalize_) + "; expected 0 or 1");
  }
  void output_shapes(const DimsExprs* in, DimsExprs* out, IExprBuilder& builder) const override {
    for (int i = 0; i < 2; i++) {
      out[i].nbDims = 2;
      out[i].d[0] = in[0].d[0];
      out[i].d[1] = builder.constant(top_k_);
    }
  }
  IPluginV3* clone() noexcept override { return new MoeRoute(*this); }

  void measure(Descs in) override {
    tokens_ = in[0].dims.d[0], experts_ = in[0].dims.d[1];
    name_ = kernel_name("moe_route", in[0].type, {{"E", experts_}, {"k", top_k_}, {"renormalize", renormalize_}});
  }
  void check_shapes(Descs in) const override { expect_shape(in, 1, {experts_}, "(E,)"); }
  std::string kernels() const override { return name_; }

  void launch(const Launcher& launcher, const void* const* in, void* const* out, char*) const override {
    const Image& image = launcher.find(name_, "route_kernel");
    launcher.launch(image, ceil_div(tokens_, image["BLOCK_T"]),
                    {in[0], in[1], out[0], out[1], tokens_, experts_, top_k_, experts_, 1, 1});
  }

 private:
  int32_t top_k_ = 0, renormalize_ = 0;
  int64_t tokens_ = 0, experts_ = 0;
  std::string name_;
};

// MoeExperts(x (T, D), weights (T, k) float32, indices (T, k) int32, w_gate_up (E, 2F, D), w_down (E, D, F)) → y (T, D)
class MoeExperts final : public Plugin {
 public:
  const char* name() const noexcept override { return "MoeExperts"; }
  std::vector<Tensor> inputs() const override {
    return {{"x", 'T', 2}, {"weights", 'f', 2}, {"indices", 'i', 2}, {"w_gate_up", 'T', 3}, {"w_down", 'T', 3}};
  }
  std::vector<Tensor> outputs() const override { return {{"y", 'T', 2}}; }
  std::vector<Attribute> attributes() override { return {}; }
  void check_attributes() const override {}
  void output_shapes(const DimsExprs* in, DimsExprs* out, IExprBuilder&) const override { out[0] = in[0]; }
  IPluginV3* clone() noexcept override { return new MoeExperts(*this); }

  void measure(Descs in) override {
    tokens_ = in[0].dims.d[0], dim_ = in[0].dims.d[1], top_k_ = in[2].dims.d[1];
    experts_ = in[4].dims.d[0], width_ = in[4].dims.d[2], type_ = in[0].type;
    name_ = kernel_name("moe_experts", type_, {{"E", experts_}, {"k", top_k_}, {"D", dim_}, {"F", width_}});
  }
  void check_shapes(Descs in) const override {
    expect_shape(in, 1, {tokens_, top_k_}, "(T, k)");
    expect_shape(in, 2, {tokens_, top_k_}, "(T, k)");
    expect_shape(in, 3, {experts_, 2 * width_, dim_}, "(E, 2F, D)");
    expect_shape(in, 4, {experts_, dim_, width_}, "(E, D, F)");
    require(pairs() <= INT32_MAX,
            "there are " + std::to_string(pairs()) + " pairs of token and expert; expected fewer than 2^31");
  }
  std::string kernels() const override { return name_; }
  size_t workspace() const override {
    const int64_t blocks = ceil_div(pairs(), smallest(name_, "order_kernel", "BLOCK"));
    return size_t(places(blocks, smallest(name_, "order_kernel", "EXPERTS")).end);
  }

  void launch(const Launcher& launcher, const void* const* in, void* const* out, char* workspace) const override {
    if (tokens_ == 0) return;
    const Image& sort = launcher.find(name_, "order_kernel", pairs());
    const int64_t blocks = ceil_div(pairs(), sort["BLOCK"]);
    const Places at = places(blocks, sort["EXPERTS"]);
    char *order = workspace + at.order, *offsets = workspace + at.offsets, *counts = workspace + at.counts;
    char *hidden = workspace + at.hidden, *rows = workspace + at.rows;
    if (blocks > 1)
      launcher.launch(launcher.find(name_, "count_kernel"), blocks, {in[2], counts, pairs(), experts_, top_k_, top_k_, 1});
    launcher.launch(sort, blocks, {in[2], counts, order, offsets, pairs(), blocks, experts_, top_k_, top_k_, 1});

    const Image& up = launcher.find(name_, "hidden_kernel", rows_per_expert());
    int64_t tiles = tiles_of(up["BLOCK_M"]);
    launcher.launch(up, tiles * ceil_div(width_, up["BLOCK_N"]),
                    {in[0], in[3], order, offsets, hidden, tiles, experts_, top_k_, dim_, width_,
                     dim_, 1, 2 * width_ * dim_, dim_, 1});
    const Image& down = launcher.find(name_, "rows_kernel", rows_per_expert());
    tiles = tiles_of(down["BLOCK_M"]);
    launcher.launch(down, tiles * ceil_div(dim_, down["BLOCK_N"]),
                    {hidden, in[4], order, offsets, rows, tiles, experts_, width_, dim_, dim_ * width_, 1, width_});
    const Image& sum = launcher.find(name_, "combine_kernel");
    launcher.launch(sum, ceil_div(tokens_, sum["BLOCK"] / sum["BLOCK_D"]) * ceil_div(dim_, sum["BLOCK_D"]),
                    {rows, in[1], in[2], out[0], tokens_, experts_, top_k_, dim_, top_k_, 1, top_k_, 1});
  }

 private:
  // Where in the workspace what lies, in bytes.
  struct Places {
    int64_t order, offsets, counts, hidden, rows, end;
  };
  Places places(int64_t blocks, int64_t columns) const {
    const int64_t sizes[] = {4 * pairs(), 4 * (experts_ + 1), 4 * blocks * columns, bytes_of(type_) * pairs() * width_,
                             bytes_of(type_) * pairs() * dim_};
    int64_t at[6] = {};
    for (int i = 0; i < 5; i++) at[i + 1] = at[i] + ceil_div(sizes[i], 256) * 256;
    return {at[0], at[1], at[2], at[3], at[4], at[5]};
  }
  int64_t pairs() const { return tokens_ * top_k_; }
  // Enough tiles of rows for any distribution of the pairs over the experts.
  int64_t tiles_of(int64_t rows) const { return std::min(ceil_div(pairs(), rows) + experts_, pairs()); }
  // The size class of the grouped products: rounded up to a power of two.
  int64_t rows_per_expert() const {
    int64_t rows = 1;
    while (rows < ceil_div(pairs(), experts_)) rows *= 2;
    return rows;
  }

  int64_t tokens_ = 0, dim_ = 0, top_k_ = 0, experts_ = 0, width_ = 0;
  DataType type_ = DataType::kFLOAT;
  std::string name_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* moe_route() {
  static Creator<MoeRoute> creator;
  return &creator;
}

nvinfer1::IPluginCreatorInterface* moe_experts() {
  static Creator<MoeExperts> creator;
  return &creator;
}

}  // namespace genrec
