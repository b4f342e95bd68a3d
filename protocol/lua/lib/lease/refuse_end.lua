--- @include lib/lease/refuse

-- Refuse an end by an execution that is not the current one; 'already' if its end was applied before, and the reply got
-- lost. last: of the hash.
local function refuse_end(id, execution, incarnation, queue, last)
  if last and string.sub(last, 1, #execution + 1) == execution .. ':' then return 'already' end
  return refuse(id, execution, incarnation, queue)
end
