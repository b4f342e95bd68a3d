--- @include lib/push
--- @include lib/ring
--- @include lib/watch_deadline

-- To the front of its queue: it has waited its turn already.
local function to_front(queue, id)
  push('LPUSH', queue, id)
  watch_deadline(queue, id)
  ring(queue)
end
