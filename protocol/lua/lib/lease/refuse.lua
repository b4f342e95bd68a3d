--- @include lib/basics/counters
--- @include lib/lease/void

-- Refuse a write by an execution that is not the current one. queue: of the hash, nil without a hash. Returns 'lost'.
local function refuse(id, execution, incarnation, queue)
  void(id, execution, incarnation, queue)
  count('fenced', queue or '')
  return 'lost'
end
